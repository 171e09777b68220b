// SPDX-License-Identifier: MIT
// keel/doctor.h: whether a device computes right, and which of keel's kernels it should use.
//
// Most operations exist in variants that use more of a device than the base one. Drivers that claim a feature may compute garbage
// with it, and what is fast on one device is slow on another; so each variant is compared with a reference on the CPU and timed, and
// the verdict is kept in the cache folder by device, driver, clamp profile and the shaders of this version of keel.
#ifndef KEEL_DOCTOR_H
#define KEEL_DOCTOR_H

#include <keel/model.h>

#ifdef __cplusplus
extern "C" {
#endif

// One op with one variant.
struct keel_doctor_row {
    char op[32];       // "linear backward"
    char family[16];   // what variants are chosen for: "matmul_bwd"; "" for ops with one variant
    char variant[16];  // "base", "exchange", "coop", "coop16"
    uint32_t cases;    // run so far; the last one was wrong unless `right`
    bool right;
    bool chosen;       // in use from now on
    double worst;      // largest error as a part of what rounding explains
    double ms;         // on the shapes of the model, or of a middling one; 0: not timed
    char why[224];     // what was wrong, "" if nothing
};
struct keel_doctor_report {
    struct keel_doctor_row row[64];
    uint32_t n_rows;
    bool lacks_coop;       // the device has cooperative matrices, but this build has no shaders for them: its compiler was too old
    uint32_t n_base_wrong; // ops whose base variant is wrong: nothing this device computes can be trusted
};

struct keel_doctor_params {
    bool quick;          // few cases and one weight type: a few seconds at first use. Else everything, minutes on a CPU driver
    keel_model *model;   // loaded onto the device: time its matrices; NULL: a middling one
    void (*progress)(void *user, const struct keel_doctor_row *row); // after each row; may be NULL
    void *user;
};

// Checks and times every variant on `dev`, sets what it uses from now on, and keeps the verdict. A variant that does not compile or
// is wrong is left out with one warning. The report is complete when OK is returned, also if base variants are wrong.
// Errors: NO_MEMORY, DEVICE_LOST, DEVICE.
KEEL_API keel_status keel_doctor_run(keel_device *dev, const struct keel_doctor_params *params, struct keel_doctor_report *report);

// A whole model on the kernels that are in force.
struct keel_doctor_whole {
    uint32_t n_tokens;
    double worst;          // largest difference of a log-probability from the golden one, nats
    bool forward_right;    // all within 1e-3; 1e-2 if a variant in force is less exact than f32
    double loss_before, loss_after, fall_foretold; // of one training step, nats a token
    bool step_right;       // the loss fell by what the gradient foretold, within 2 %
};
// Runs the rows of `golden_path` (JSON: {"model_hash", "rows": [{"ids", "logprobs"}]}, made by tests/oracle/make_golden.py) on a loaded
// model, then one training step of a rank-4 adapter. Errors: FORMAT, MISMATCH (values of another model), NO_MEMORY, DEVICE_LOST,
// NUMERIC.
KEEL_API keel_status keel_doctor_model(keel_model *model, const char *golden_path, struct keel_doctor_whole *out);

// What a program does after it opened a device: takes the verdict from the cache, or makes a quick one. Warns when a base variant is
// known to be wrong. `variant`, unless NULL or "", is forced instead, for looking for faults: "NAME" wherever it exists, or
// "FAMILY=NAME,...". Errors: ARG (unknown, or not on this device), NO_MEMORY, DEVICE_LOST.
KEEL_API keel_status keel_doctor_prepare(keel_device *dev, const char *variant);

#ifdef __cplusplus
}
#endif
#endif
