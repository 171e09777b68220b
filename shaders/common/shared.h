// SPDX-License-Identifier: MIT
// shaders/common/shared.h: lets one header describe push constants for C and GLSL.
// A family's header holds plain structs of uint and float; a shader that uses struct s declares
// `layout(push_constant) uniform Push { s pc; };`.
#ifndef KEEL_SHARED_H
#define KEEL_SHARED_H
#ifndef GL_core_profile
#include <stdint.h>
typedef uint32_t uint;
#define STRUCT(s) struct s // a member of that type
#else
#define STRUCT(s) s
#endif
#endif
