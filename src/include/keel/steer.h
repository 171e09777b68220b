// SPDX-License-Identifier: MIT
// keel/steer.h: activations of a data set, directions made of them, and steering along directions.
//
// The usual way: read rows of two classes (or pairs), capture both, estimate directions, write them; then add them to the hooks
// of a session or of a training run. Methods, gates and their sources: docs/steering.md.
// Thread safety: as keel/session.h.
#ifndef KEEL_STEER_H
#define KEEL_STEER_H

#include <keel/hooks.h>
#include <keel/images.h>

#ifdef __cplusplus
extern "C" {
#endif

// --- rows ----------------------------------------------------------------------------------------

// Rows to be run through the model: a prompt and, where there is one, a response.
struct keel_steer_rows {
    struct keel_score_row *row; // [n]; logprobs are the list's own
    char **id;                  // [n] "id" of the row as JSON text
    size_t n, cap;
    uint32_t longest;           // tokens
    size_t n_responses;         // rows with a response
};
// Reads a JSONL file: {"prompt" or "messages", "completion"?, "images"?, "id"?}. Without a completion the last turn of "messages",
// if it is the assistant's, is the response. Errors: IO, DATA (file and line; no rows), and those of keel_prompt_row().
KEEL_API keel_status keel_steer_rows_read(struct keel_steer_rows *out, const keel_model *model, keel_images *images, const char *path,
                                          const keel_log *log);
// The same for contrastive pairs: {"positive": P, "negative": N}, each a text or a row as above. Row i of both belongs together.
KEEL_API keel_status keel_steer_pairs_read(struct keel_steer_rows *positive, struct keel_steer_rows *negative, const keel_model *model,
                                           keel_images *images, const char *path, const keel_log *log);
KEEL_API void keel_steer_rows_finish(struct keel_steer_rows *rows); // frees; accepts all-zero

// --- capture -------------------------------------------------------------------------------------

struct keel_capture_params {
    enum keel_site site;
    const uint8_t *layers;      // [n_layers of the model] which ones; NULL: all
    struct keel_positions at;   // one set: DECODE is empty here
    bool covariance;            // [width, width] a layer, added up on the device
    const char *raw;            // write every captured token to this safetensors file, or NULL
    bool raw_f16;               // as F16 rather than F32
    const char *const *raw_ids; // [n rows] ids for the file, or NULL
    keel_hooks *hooks;          // steer at the same time: an own list that captures may be added to, used up by the call; or NULL
    keel_images *images;        // sites in the vision tower: where the rows' images come from. `at` is all or image there: every patch
};
struct keel_capture_layer {
    uint32_t layer;
    double *mean, *var, *size; // [width] over all captured tokens: mean, variance (of the population), mean of |x|
    double *cov;               // [width, width] or NULL
    float *rows;               // [n_rows, width] mean over the captured tokens of each row
    double median_norm;        // of the captured tokens
};
struct keel_capture {
    uint32_t width, n_layers;
    enum keel_site site;
    size_t n_rows;
    uint64_t n_tokens;
    uint32_t *row_tokens; // [n_rows] captured
    struct keel_capture_layer *layer; // [n_layers], ascending
};
// Runs the rows through the session, with its adapters. Sums are kept on the device, so a data set of any size needs no disk; the
// log-probabilities of responses are left in the rows. Errors: DATA (a row without a token at these positions: its number), ARG, IO,
// NO_MEMORY, and those of keel_session_score(). Replaces the session's hooks and leaves it without.
KEEL_API keel_status keel_capture_run(struct keel_capture *out, keel_session *session, struct keel_steer_rows *rows,
                                      const struct keel_capture_params *params,
                                      bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);
KEEL_API void keel_capture_finish(struct keel_capture *capture); // frees; accepts all-zero
// Writes sums and row means to a safetensors file: mean.L, var.L, abs.L, cov.L, rows.L, row_tokens, logprob. Errors: IO, NO_MEMORY.
KEEL_API keel_status keel_capture_write(const struct keel_capture *capture, const struct keel_steer_rows *rows, keel_model *model,
                                        const struct keel_capture_params *params, const char *path);

// --- directions ----------------------------------------------------------------------------------

// Checks of a direction on the rows it was made of (science notes 3.2).
struct keel_gates {
    double split_half;    // mean cosine of directions of two halves of the rows, over `n_splits`; NaN: too few rows
    uint32_t n_splits;
    double massive_share; // of |v|² in channels whose mean |h| is above 20 × the median channel's
    uint32_t n_massive, massive[8]; // how many such channels, and the first of them
    double effect, auc;   // on halves that the direction was not made of: distance of the classes in standard deviations, and AUC
    double random_95;     // 95th percentile of the effect of 100 random directions
    bool admissible;      // split_half >= 0.5, massive_share < 0.05, effect above random_95
};
struct keel_direction {
    uint32_t layer, k; // k rows; above 1: an orthonormal subspace
    float *v;          // [k, width]; for k = 1 scaled so that adding it moves by the distance of the classes along it
    double median_norm; // of the residual stream where it was measured; 0: unknown
    bool has_gates;
    struct keel_gates gates;
};
struct keel_directions {
    uint32_t width, n;
    enum keel_site site;
    char method[32];
    uint64_t model_hash; // of the model file; 0: unknown
    struct keel_direction *at; // [n], ascending layers
};
KEEL_API void keel_directions_finish(struct keel_directions *d); // frees; accepts all-zero

KEEL_API double keel_direction_length(const float *v, uint32_t width); // |v|

struct keel_direction_params {
    const char *method; // "mean", "mean_z", "mean_mask", "lda", "probe", "pca_diff", "pca_center", "svd"
    uint32_t k;         // svd: directions; otherwise 1
    bool paired;        // row i of both belongs together
    uint64_t seed;      // of splits and random directions
};
// Whether there are such directions, before rows are captured. Errors: ARG (unknown method, a method for pairs without pairs, k of
// another method than svd).
KEEL_API keel_status keel_directions_check(const struct keel_direction_params *params, const keel_log *log);
// Directions that point from `negative` to `positive`, for every layer captured, with their gates. A layer in which the classes do not
// differ is left out with a warning. Errors: ARG (unknown method, a method for pairs without pairs, other layers or sites), DATA (fewer
// than 2 rows of a class, NaN, no difference in any layer), NO_MEMORY.
KEEL_API keel_status keel_directions_estimate(struct keel_directions *out, const struct keel_capture *positive,
                                              const struct keel_capture *negative, const struct keel_direction_params *params,
                                              const keel_log *log);
// A path ending in .gguf is a control vector as llama.cpp and repeng have it: direction.N is added to what leaves layer N, which
// is why layer 0 has none there (a warning), and subspaces and other sites need safetensors. Errors: IO, UNSUPPORTED, NO_MEMORY.
KEEL_API keel_status keel_directions_write(const struct keel_directions *d, const char *path, const keel_log *log);
// Whether they fit that kind of file: asks for site, layers and k only, so before the directions are there. Errors: UNSUPPORTED.
KEEL_API keel_status keel_directions_writable(const struct keel_directions *d, const char *path, const keel_log *log);
// Errors: IO, FORMAT (no directions, other shapes, an unknown site, a direction of length 0), NUMERIC (NaN), NO_MEMORY.
KEEL_API keel_status keel_directions_read(struct keel_directions *out, const char *path, const keel_log *log);

// --- steering ------------------------------------------------------------------------------------

// Words FILE[:COEF[%]][@LAYERS][,KEY=VALUE]...; COEF 1 if not given, with % of the residual stream's median norm along the unit
// direction. Keys: op (add, ablate, cap, floor; for cap and floor COEF is the limit of the projection, ablate has none), at (positions),
// site (pre, post, attn, mlp; otherwise the file's), tokens and steps (schedules).
struct keel_steer_words {
    char *text;         // owned; `file` and `layers` point into it
    const char *words;  // as given, borrowed
    const char *file, *layers; // layers as keel_layers_parse() takes them; NULL: all of the file
    double coef;
    bool percent;
    enum keel_hook_op op;
    struct keel_positions at;
    struct keel_hook_schedule tokens, steps;
    int site; // enum keel_site, or -1: the file's
};
// Errors: ARG (what is not understood; a coefficient beside op=ablate), NO_MEMORY. Layers are not looked at. After an error it is empty.
KEEL_API keel_status keel_steer_parse(struct keel_steer_words *out, const char *words, const keel_log *log);
KEEL_API void keel_steer_words_finish(struct keel_steer_words *words); // frees; accepts all-zero

// Words FILE[@LAYER], which mean one direction: the rest of `out` is as if not given. Errors: ARG, NO_MEMORY. After an error it is empty.
KEEL_API keel_status keel_steer_parse_one(struct keel_steer_words *out, const char *words, const keel_log *log);
// Which of these directions they mean: that of the layer, or the only one. Errors: ARG (there is none, or several; a subspace).
KEEL_API keel_status keel_directions_one(const struct keel_direction **out, const struct keel_directions *d,
                                         const struct keel_steer_words *words, const keel_log *log);

// Adds hooks from words. Errors: ARG, IO, FORMAT, MISMATCH (another width; a layer the model or the file lacks). Warns if the file was made
// with another model. The model need not be on a device.
KEEL_API keel_status keel_steer_add(keel_hooks *hooks, keel_model *model, const char *words);
// The same with directions in place of those of the file.
KEEL_API keel_status keel_steer_add_directions(keel_hooks *hooks, keel_model *model, const struct keel_steer_words *words,
                                               const struct keel_directions *d);

// Whether rows of the model can be projected on these. Errors: UNSUPPORTED (a site of the tower), MISMATCH (width, layers).
KEEL_API keel_status keel_steer_project_check(const struct keel_directions *d, const keel_model *model, const keel_log *log);
// Projections of the captured tokens of each row on the unit directions: mean [n_rows, d->n, max k], NaN beyond a layer's k. As
// keel_capture_run() otherwise.
KEEL_API keel_status keel_steer_project(keel_session *session, struct keel_steer_rows *rows, const struct keel_directions *d,
                                        struct keel_positions at, keel_hooks *hooks, double *mean, uint32_t max_k,
                                        bool (*progress)(void *user, uint64_t done, uint64_t total), void *user);

// --- geometry ------------------------------------------------------------------------------------

#define KEEL_SCREE 32u
// Of the differences of row means, rows after against rows before, as they are (their mean counts).
struct keel_shift_geometry {
    uint32_t layer;
    uint32_t components[4]; // leading components that hold 50, 80, 90 and 95 % of the sum of squares; 0 without any shift
    double scree[KEEL_SCREE]; // share of the sum of squares of each leading component
    double participation;   // (Σλ)² / Σλ² of their squared singular values
    double mean_shift;      // length of the mean difference
    double median_norm;     // of the tokens before
    uint32_t n_massive, massive[8]; // channels whose mean |h| before is above 20 × the median channel's: how many, and the first
};
// out [n_layers]. The captures are of the same rows, layers and positions. *spaces: up to k leading directions of every layer that
// moved, for keel_geometry_overlap(); to be finished by the caller. Errors: NO_MEMORY, NUMERIC.
KEEL_API keel_status keel_geometry_shift(struct keel_shift_geometry *out, struct keel_directions *spaces, uint32_t k,
                                         const struct keel_capture *after, const struct keel_capture *before, const keel_log *log);
// Cosines of the principal angles between the spaces of two directions, descending, [min(rank)] of room for [min(a->k, b->k)]; overlap:
// the mean of their squares. rank: dimensions of the two spaces, fewer than k where rows depend on others. Random spaces of r and s
// dimensions overlap by about max(r, s) / width. Errors: DATA (a direction of length 0), NO_MEMORY, NUMERIC.
KEEL_API keel_status keel_geometry_overlap(const struct keel_direction *a, const struct keel_direction *b, uint32_t width,
                                           double *cosines, double *overlap, uint32_t rank[2], const keel_log *log);
// What an adapter adds to one weight matrix: norms of ΔW = scale · B A, found without forming it; stable rank |ΔW|²_F / |ΔW|²_2.
struct keel_delta {
    uint32_t layer, rank;
    const char *module; // "attn_q"
    double frobenius, spectral, stable_rank;
    double base; // |W|_F of the matrix it is added to
};
// *out [*n], layer by layer, belongs to the caller (free()). The model must be loaded. Errors: as keel_session_add_adapter(), NUMERIC.
KEEL_API keel_status keel_geometry_adapter(struct keel_delta **out, size_t *n, keel_model *model, const char *path, float scale);
// How the ΔW of two adapters lie to each other at one matrix: between runs, ranks, modalities, cycles.
struct keel_delta_overlap {
    uint32_t layer;
    const char *module;
    double cosine;                // of the two ΔW as vectors; random ones: about 0
    uint32_t rank[2];             // of the two ΔW: dimensions of those spaces
    double in, out;               // overlap (mean squared cosine of principal angles) of the spaces they read from and write to
    double random_in, random_out; // of random spaces of their ranks
};
// As keel_geometry_adapter(), scale [2] of the two; matrices that only one of them changes are left out.
KEEL_API keel_status keel_geometry_adapters(struct keel_delta_overlap **out, size_t *n, keel_model *model, const char *first,
                                            const char *second, const float scale[2]);

// How well a linear probe (ridge logistic regression on standardised channels, as method "probe") tells positive rows from negative
// ones, at each layer, within a set and from set to set.
#define KEEL_MAX_PROBE_SETS 8u
struct keel_probe_set {
    const struct keel_capture *positive, *negative; // same layers and width in all sets
};
struct keel_probe_layer {
    uint32_t layer;
    double auc[KEEL_MAX_PROBE_SETS * KEEL_MAX_PROBE_SETS]; // [trained on i × n + tested on j]; i = j: 5-fold, rows i of both classes in one fold
    double shuffled[KEEL_MAX_PROBE_SETS];                  // the same as i = j with shuffled labels: what chance gives
};
// out [n_layers]. Errors: DATA (too few rows for folds), NO_MEMORY, NUMERIC.
KEEL_API keel_status keel_geometry_probe(struct keel_probe_layer *out, const struct keel_probe_set *sets, size_t n, uint64_t seed,
                                         const keel_log *log);

#ifdef __cplusplus
}
#endif
#endif
