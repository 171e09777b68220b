// SPDX-License-Identifier: MIT
// cli/cli.h: what the commands share: common options, opening a device, model and session, progress, rows, output files.
// The commands use <keel/*.h>, jansson and libc only: what they do, any program can do.
#ifndef KEEL_CLI_H
#define KEEL_CLI_H

#include "args.h"

#include <keel/images.h>
#include <keel/model.h>
#include <keel/session.h>
#include <keel/steer.h>

#include <jansson.h>
#include <stdio.h>

// Exit codes of the program.
enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_BUDGET = 3 };
int exit_code(keel_status st);

// --- common options ------------------------------------------------------------------------------

struct common {
    bool verbose, quiet, pan_and_scan;
    const char *model, *type, *mmproj, *device, *profile, *variant, *kv;
    bool validate;
    uint64_t memory_limit;
    struct arg_list lora, steer;
    uint32_t ctx, batch_tokens;
};
// A command's struct begins with a `struct common` named `common`; these rows fill it in.
#define OPT_COMMON(field) offsetof(struct common, field)
#define OPTIONS_LOG                                                                                                    \
    { .type = ARG_HEAD, .help = "Messages" },                                                                          \
        { .name = "--verbose", .brief = "-v", .type = ARG_FLAG, .offset = OPT_COMMON(verbose), .help = "more messages" }, \
        { .name = "--quiet", .brief = "-q", .type = ARG_FLAG, .offset = OPT_COMMON(quiet), .help = "errors only, no progress" }
#define OPTION_TYPE                                                                                                    \
    { .name = "--type", .type = ARG_STR, .offset = OPT_COMMON(type), .value = "T",                                     \
      .help = "of a folder: store its matrices as q4_0, q4_k_m, ... (keel quantize --help lists them); not given: as they are" }
#define OPTION_MODEL                                                                                                   \
    { .name = "--model", .brief = "-m", .type = ARG_STR, .offset = OPT_COMMON(model), .file = ARG_IN, .value = "MODEL", .needed = true, \
      .help = "model: a GGUF file, a Hugging Face folder (converted once, into the cache), or clerk, which comes with keel" }, \
        OPTION_TYPE
#define OPTION_MMPROJ                                                                                                  \
    { .name = "--mmproj", .type = ARG_STR, .offset = OPT_COMMON(mmproj), .file = ARG_IN, .value = "P",                                 \
      .help = "vision tower for images: an mmproj GGUF made for the model, or its Hugging Face folder" }
#define OPTIONS_IMAGES                                                                                                 \
    OPTION_MMPROJ,                                                                                                     \
        { .name = "--pan-and-scan", .type = ARG_FLAG, .offset = OPT_COMMON(pan_and_scan),                              \
          .help = "show images that are long or tall in up to 4 crops too" }
#define OPTIONS_DEVICE                                                                                                 \
    { .type = ARG_HEAD, .help = "Device" },                                                                            \
        { .name = "--device", .type = ARG_STR, .offset = OPT_COMMON(device), .value = "D",                             \
          .help = "index or part of the name; without it the fastest (keel devices lists them)" },                     \
        { .name = "--caps", .type = ARG_STR, .offset = OPT_COMMON(profile), .value = "PROFILE",                        \
          .choice = (const char *const[]){ "min", "rpi", "mali", "discrete", NULL },                                 \
          .help = "use no more than a smaller device offers: min, rpi, mali, discrete" },                              \
        { .name = "--variant", .type = ARG_STR, .offset = OPT_COMMON(variant), .value = "V",                           \
          .help = "force a kernel variant, to look for faults: NAME or FAMILY=NAME,... (keel doctor lists them)" },     \
        { .name = "--validate", .type = ARG_FLAG, .offset = OPT_COMMON(validate),                                      \
          .help = "turn on the Vulkan validation layer; a message is a failure" },                                     \
        { .name = "--memory-limit", .type = ARG_SIZE, .offset = OPT_COMMON(memory_limit), .value = "SIZE", .def = "0", \
          .help = "use at most this much device memory (512M, 2G); 0: all" }
#define OPTION_LORA                                                                                                    \
    { .name = "--lora", .type = ARG_LIST, .offset = OPT_COMMON(lora), .file = ARG_IN, .value = "A[:SCALE]",                            \
      .help = "add an adapter: a GGUF or a PEFT folder" }
#define OPTION_STEER                                                                                                   \
    { .name = "--steer", .type = ARG_LIST, .offset = OPT_COMMON(steer), .file = ARG_IN, .value = "V[:COEF[%]][@LAYERS][,K=V]",         \
      .help = "steer along the directions of a file: op=add|ablate|cap|floor, at=POSITIONS, site=S, tokens=SCHEDULE, steps=SCHEDULE (docs/steering.md)" }
#define OPTION_KV                                                                                                      \
    { .name = "--kv", .type = ARG_STR, .offset = OPT_COMMON(kv), .value = "T", .def = "f32",                           \
      .choice = (const char *const[]){ "f32", "f16", "q8_0", NULL },                                                   \
      .help = "keep keys and values as f32, f16 or q8_0: less memory, a little less exact (docs/numerics.md)" }
#define OPTIONS_SESSION                                                                                                \
    { .name = "--ctx", .type = ARG_U32, .offset = OPT_COMMON(ctx), .value = "N", .def = "0", .min = 0, .max = 1 << 24, \
      .help = "context in tokens; 0: as long as needed, at most 4096" },                                               \
        { .name = "--batch-tokens", .type = ARG_U32, .offset = OPT_COMMON(batch_tokens), .value = "N", .def = "256",   \
          .min = 1, .max = 65536, .help = "tokens a pass takes at once" }

// --- context -------------------------------------------------------------------------------------

struct context {
    keel_log log;
    keel_device *dev;
    keel_model *model;
    keel_images *images; // NULL without --mmproj
    bool images_adapted; // --lora is in force in the tower
    keel_session *session;
    keel_hooks *hooks; // of the session, or NULL
    uint64_t load_ns;
    bool unprepared; // set by a command that chooses kernel variants by itself, or runs none
};
// The program's log: to stderr, level from -v and -q.
keel_log cli_log(const struct common *o);
// Opens the model only, and with --mmproj its vision tower. The context must be released with context_close() in every case.
keel_status context_open_model(struct context *c, const struct common *o);
// Device, then model with its weights.
keel_status context_load(struct context *c, const struct common *o);
// Encodes the images that were added to c->images; does nothing without any. Best before the model is loaded, so that the two
// do not share the device's memory.
keel_status context_encode_images(struct context *c, const struct common *o);
keel_status context_open_device(struct context *c, const struct common *o);
// Replaces the name of a model that comes with keel ("clerk") by its file, and sets its vision tower if none is set. Any other
// model, also a file of that name, stays as it is.
void shipped_resolve(struct common *o);
// Path of the log-probabilities that the clerk must give, for keel doctor; NULL: not installed. Static storage.
const char *shipped_golden(void);
// Hooks of --steer, which the caller destroys after the session; NULL without any.
keel_status context_steer(struct context *c, const struct common *o, keel_hooks **hooks);
// Reads --site and --layers: sets p->site, p->layers (*use, to be freed) and p->images.
keel_status context_site(const struct context *c, const char *site, const char *layers, struct keel_capture_params *p, uint8_t **use);
// Reads --positions for that site. NULL: the response where all rows have one, else the last token of the prompt; all patches of a tower.
keel_status context_positions(const struct context *c, const char *text, bool responses, struct keel_capture_params *p);
// Session with the adapters of --lora and the hooks of --steer. n_ctx 0: o->ctx, which may itself be 0.
keel_status context_open_session(struct context *c, const struct common *o, uint32_t n_ctx);
// Returns the exit code for `st`; with --validate a validation message turns success into failure.
int context_close(struct context *c, keel_status st);

// Puts "FILE:LINE: " before the messages that follow, the library's too; 0: no longer.
void log_at(const char *file, size_t line);
void say(const struct context *c, enum keel_log_level level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// --- signals -------------------------------------------------------------------------------------

// SIGINT and SIGTERM set a flag that the progress callbacks read, and tell the library; the second one ends the process.
void stop_install(void);
bool stop_asked(void);
void stop_breaks_reads(bool on); // whether a signal makes a read that waits return; off at first

// --- progress ------------------------------------------------------------------------------------

// One line that overwrites itself on a terminal, a plain line every few seconds elsewhere. Zeroed and `what` set: ready.
struct progress {
    const char *what, *unit; // "score", "tokens"
    bool off;
    uint64_t start_ns, last_ns;
    uint64_t done0; // done at the first call, which does not count into the rate
};
// `extra` is put between count and rate; may be "".
void progress_show(struct progress *p, uint64_t done, uint64_t total, const char *extra);
void progress_end(struct progress *p); // leaves the terminal on a fresh line
void progress_clear(void);             // removes a progress line so that a message can be printed
uint64_t now_ns(void);
// The callback form for keel_session_score(): `user` is a struct progress. False when a stop was asked for.
bool progress_tokens(void *user, uint64_t done, uint64_t total);

// --- files and text ------------------------------------------------------------------------------

// Reads a whole file, or standard input for "-". free(*data). Failure was reported.
// The bytes are followed by a NUL that `len` does not count.
bool read_all(const char *path, char **data, size_t *len);
// A file that appears only when complete; "-" is standard output.
struct out_file {
    FILE *f;
    const char *path;
    char tmp[4200];
};
bool out_open(struct out_file *o, const char *path);
bool out_commit(struct out_file *o);
void out_abort(struct out_file *o);
// Prints a JSON value and a newline; frees it. 9 digits keep a float exactly.
void print_json(FILE *f, json_t *value);
// A JSON string from bytes that may be broken UTF-8: bad bytes become U+FFFD.
json_t *json_text(const char *bytes, size_t len);
// "178.3 MB"; static ring of buffers.
const char *bytes_text(uint64_t bytes);
json_t *plan_json(const struct keel_plan *plan);
void plan_print(FILE *f, const struct keel_plan *plan);

#endif
