// SPDX-License-Identifier: MIT
// keel/hooks.h: reading and changing activations while a model runs: directions added, taken out or limited at chosen places
// of chosen layers, for chosen tokens. The model itself knows nothing of them; without hooks nothing is computed for them.
#ifndef KEEL_HOOKS_H
#define KEEL_HOOKS_H

#include <keel/images.h>
#include <keel/session.h>

#ifdef __cplusplus
extern "C" {
#endif

// Where a hook sits. Layers are counted from 0; what leaves layer i enters layer i + 1.
enum keel_site {
    KEEL_SITE_PRE,  // residual stream that enters a layer
    KEEL_SITE_POST, // residual stream that leaves it
    KEEL_SITE_ATTN, // what attention adds to the residual stream: after the output projection and its norm
    KEEL_SITE_MLP,  // what the MLP adds to it, after its norm
    KEEL_SITE_TOWER, // here the same four sites of the vision tower begin: its layers and width, its patches as tokens
    KEEL_SITE_TOWER_PRE = KEEL_SITE_TOWER,
    KEEL_SITE_TOWER_POST,
    KEEL_SITE_TOWER_ATTN,
    KEEL_SITE_TOWER_MLP,
    KEEL_N_SITES
};
extern KEEL_API const char *const keel_site_name[KEEL_N_SITES + 1]; // "pre", "post", "attn", "mlp", "tower.pre", ..., NULL

// Which tokens a hook is for. Tokens of the response are those that are scored, trained on or generated; a chat's earlier
// answers belong to its prompt when it is scored, to its response while it runs.
enum keel_position_kind {
    KEEL_AT_ALL,
    KEEL_AT_PROMPT,
    KEEL_AT_RESPONSE,
    KEEL_AT_LAST_PROMPT, // the last token before a response, whose logits predict its first token
    KEEL_AT_FIRST,       // the first k tokens of a response
    KEEL_AT_IMAGE,       // tokens of images
    KEEL_AT_DECODE,      // tokens that the model itself wrote: the response while generating, nothing otherwise
};
struct keel_positions {
    enum keel_position_kind kind;
    uint32_t k; // KEEL_AT_FIRST
};
// "all", "prompt", "response", "last_prompt", "first:K", "image" or "decode". Errors: ARG.
KEEL_API keel_status keel_positions_parse(const char *text, struct keel_positions *out, const keel_log *log);
// Layers in words: "3", "3-7", "1,4-6" or "all" sets use[i] of the n layers. Errors: ARG (out of range: names the layer).
KEEL_API keel_status keel_layers_parse(const char *text, uint8_t *use, uint32_t n, const keel_log *log);

// How much of a hook acts as a count t = 0, 1, 2, ... goes on: all of it, or a share that falls or rises. The share scales what the
// hook changes: the amount of ADD, the component that ABLATE takes, what a limit cuts. Shapes over a response: "Start" and "Dim" of
// Scalena et al. 2024 (arXiv 2406.17563) are FIRST and LINEAR; over training steps they are those of learning rates.
enum keel_hook_schedule_kind {
    KEEL_HOOK_ALWAYS,
    KEEL_HOOK_FIRST,  // 1 while t < n, then 0
    KEEL_HOOK_LINEAR, // 1 - t/n, then 0
    KEEL_HOOK_DECAY,  // 2^(-t/n): halves every n
    KEEL_HOOK_RAMP,   // t/n, then 1
};
struct keel_hook_schedule {
    enum keel_hook_schedule_kind kind;
    uint32_t n; // above 0 unless ALWAYS
};
// "first:N", "linear:N", "decay:N" or "ramp:N". Errors: ARG.
KEEL_API keel_status keel_hook_schedule_parse(const char *text, struct keel_hook_schedule *out, const keel_log *log);

enum keel_hook_op {
    KEEL_HOOK_ADD,    // h += amount · v
    KEEL_HOOK_ABLATE, // h loses its component in the space of the k directions (Arditi et al. 2024)
    KEEL_HOOK_CAP,    // h loses what its projection on v/|v| has above `amount`
    KEEL_HOOK_FLOOR,  // h gains what its projection has below `amount` (activation capping, arXiv 2601.10387)
};
struct keel_hook_params {
    enum keel_site site;
    uint32_t layer;
    enum keel_hook_op op;
    struct keel_positions at;
    const float *v; // [k, width], copied
    uint32_t k;     // above 1 for ABLATE only, and at most the width
    float amount;   // in units of the activations
    struct keel_hook_schedule tokens; // t: the token's place in its response; 0 in a prompt
    struct keel_hook_schedule steps;  // t: steps of training done; in training only
};

typedef struct keel_hooks keel_hooks;
// An empty list for a loaded model, which must outlive it.
KEEL_API keel_status keel_hooks_create(keel_hooks **out, keel_model *model);
KEEL_API void keel_hooks_destroy(keel_hooks **hooks); // accepts NULL and pointers to NULL; no session may still have it
// Adds a hook; hooks of one place act in the order they were added. In the vision tower all tokens are meant (KEEL_AT_ALL or
// KEEL_AT_IMAGE), always. Errors: ARG (layer out of range, NaN, infinity, a direction of length 0, directions that depend on each
// other, a floor above a cap along the same direction, more than 8 different positions and schedules).
KEEL_API keel_status keel_hooks_add(keel_hooks *hooks, const struct keel_hook_params *params);
KEEL_API size_t keel_hooks_count(const keel_hooks *hooks);
// Lets hooks sit in the vision tower of these images, which from now on runs with those of the list: before that, and without images,
// such hooks are refused. Images encoded so far are due again. `hooks` and `images` outlive each other's use. To be called before
// hooks of the tower are added.
KEEL_API void keel_hooks_use_images(keel_hooks *hooks, keel_images *images);
// Layers and width at a site; 0 for sites of a tower that the list does not know.
KEEL_API void keel_hooks_shape(const keel_hooks *hooks, enum keel_site site, uint32_t *n_layers, uint32_t *width);

// Runs the session with these hooks from now on; NULL: without. Borrowed, and not to be added to while in use. Count in everything
// the session does; in keel_session_kl() only for the adapted model. The cache of the present sequence is kept as it is. Errors: ARG
// (a schedule over training steps).
KEEL_API keel_status keel_session_set_hooks(keel_session *session, const keel_hooks *hooks);

#ifdef __cplusplus
}
#endif
#endif
