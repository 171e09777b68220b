// SPDX-License-Identifier: MIT
// keel/keel.h: everything. keel runs Gemma 3 on any Vulkan device, fine-tunes it with LoRA on quantised weights, and measures
// how its alignment drifts while it adapts. Start with keel/model.h and keel/session.h.
#ifndef KEEL_KEEL_H
#define KEEL_KEEL_H

#include <keel/bench.h>
#include <keel/convert.h>
#include <keel/device.h>
#include <keel/hooks.h>
#include <keel/images.h>
#include <keel/log.h>
#include <keel/model.h>
#include <keel/session.h>
#include <keel/size.h>
#include <keel/status.h>
#include <keel/steer.h>
#include <keel/study.h>
#include <keel/train.h>
#include <keel/vision.h>

#ifdef __cplusplus
extern "C" {
#endif

// "0.1.0". Static storage.
KEEL_API const char *keel_version(void);

#ifdef __cplusplus
}
#endif
#endif
