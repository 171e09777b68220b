// SPDX-License-Identifier: MIT
// cli/context.c: opens what the common options name, and prints the library's messages.
#include "cli.h"

#include <keel/doctor.h>

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int exit_code(keel_status st)
{
    switch (st) {
    case KEEL_OK: return EXIT_DONE;
    case KEEL_OVER_BUDGET: return EXIT_BUDGET;
    default: return EXIT_FAILED;
    }
}

static const char *where_file; // row that the messages are about
static size_t where_line;

void log_at(const char *file, size_t line)
{
    where_file = file;
    where_line = line;
}

static void write_log(void *user, enum keel_log_level level, const char *text)
{
    static const char *const prefix[] = { "", "error: ", "warning: ", "", "" };
    (void)user;
    progress_clear();
    if (where_line) {
        fprintf(stderr, "%s%s:%zu: %s\n", prefix[level], where_file, where_line, text);
    } else {
        fprintf(stderr, "%s%s\n", prefix[level], text);
    }
}

keel_log cli_log(const struct common *o)
{
    return (keel_log){
        .level = o->quiet ? KEEL_LOG_ERROR : o->verbose ? KEEL_LOG_DEBUG : KEEL_LOG_INFO,
        .write = write_log,
    };
}

void say(const struct context *c, enum keel_log_level level, const char *fmt, ...)
{
    char text[2048];
    va_list ap;
    if (level > c->log.level) {
        return;
    }
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    write_log(NULL, level, text);
}

keel_status context_open_model(struct context *c, const struct common *o)
{
    c->log = cli_log(o);
    keel_status st = keel_model_open_as(&c->model, o->model, o->type, &c->log);
    if (st == KEEL_OK && o->mmproj) {
        st = keel_images_create(&c->images, c->model, o->mmproj, &c->log);
    }
    if (st == KEEL_OK && o->pan_and_scan && !c->images) {
        say(c, KEEL_LOG_ERROR, "--pan-and-scan needs --mmproj, the model's vision tower");
        st = KEEL_ERR_ARG;
    } else if (st == KEEL_OK && o->pan_and_scan) {
        st = keel_images_pan_and_scan(c->images, keel_pan_and_scan_params());
    }
    return st;
}

keel_status context_open_device(struct context *c, const struct common *o)
{
    const struct keel_device_params params = {
        .select = o->device,
        .profile = o->profile,
        .validate = o->validate,
        .memory_limit = o->memory_limit,
        .fault = getenv("KEEL_FAULT"), // tests/README.md
    };
    c->log = cli_log(o);
    const keel_status st = keel_device_create(&c->dev, &params, &c->log);
    return st == KEEL_OK && !c->unprepared ? keel_doctor_prepare(c->dev, o->variant) : st;
}

// The path of "PATH[:SCALE]", to be freed, and the scale. NULL: said why.
static char *adapter_path(const struct context *c, const char *text, float *scale)
{
    double number = 1.0;
    size_t len;
    if (!args_split_number(text, &len, &number)) {
        say(c, KEEL_LOG_ERROR, "--lora %s: the scale is not a number", text);
        return NULL;
    }
    *scale = (float)number;
    return strndup(text, len);
}

static keel_status add_adapter(struct context *c, const char *text)
{
    float scale;
    char *path = adapter_path(c, text, &scale);
    const keel_status st = path ? keel_session_add_adapter(c->session, path, scale) : KEEL_ERR_ARG;
    free(path);
    return st;
}

// What --lora changes in the vision tower must be in force before images are encoded.
static keel_status adapt_images(struct context *c, const struct common *o)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; st == KEEL_OK && i < o->lora.n; i++) {
        float scale;
        char *path = adapter_path(c, o->lora.at[i], &scale);
        st = path ? keel_images_add_adapter(c->images, c->model, c->dev, path, scale) : KEEL_ERR_ARG;
        free(path);
    }
    c->images_adapted = st == KEEL_OK;
    return st;
}

keel_status context_encode_images(struct context *c, const struct common *o)
{
    struct progress p = { .what = "images", .unit = "images", .off = o->quiet };
    if (!c->images) {
        return KEEL_OK;
    }
    keel_status st = c->images_adapted ? KEEL_OK : adapt_images(c, o);
    if (st == KEEL_OK && !c->hooks) { // some may sit in the tower
        st = context_steer(c, o, &c->hooks);
    }
    if (st == KEEL_OK) {
        st = keel_images_encode(c->images, c->dev, progress_tokens, &p);
    }
    progress_end(&p);
    return st;
}

keel_status context_load(struct context *c, const struct common *o)
{
    // The model first: a wrong path should not cost the start of a device.
    keel_status st = context_open_model(c, o);
    if (st == KEEL_OK) {
        st = context_open_device(c, o);
    }
    if (st == KEEL_OK) {
        const uint64_t start = now_ns();
        st = keel_model_load(c->model, c->dev);
        c->load_ns = now_ns() - start;
    }
    return st;
}

keel_status context_steer(struct context *c, const struct common *o, keel_hooks **hooks)
{
    keel_status st = KEEL_OK;
    *hooks = NULL;
    if (o->steer.n > 0) {
        st = keel_hooks_create(hooks, c->model);
    }
    if (st == KEEL_OK && *hooks && c->images) {
        keel_hooks_use_images(*hooks, c->images);
    }
    for (size_t i = 0; st == KEEL_OK && i < o->steer.n; i++) {
        st = keel_steer_add(*hooks, c->model, o->steer.at[i]);
    }
    return st;
}

keel_status context_open_session(struct context *c, const struct common *o, uint32_t n_ctx)
{
    const struct keel_session_params params = {
        .n_ctx = n_ctx ? n_ctx : o->ctx,
        .n_batch = o->batch_tokens,
        .kv = o->kv,
    };
    keel_status st = keel_session_create(&c->session, c->model, &params);
    for (size_t i = 0; st == KEEL_OK && i < o->lora.n; i++) {
        st = add_adapter(c, o->lora.at[i]);
    }
    if (st == KEEL_OK && !c->hooks) {
        st = context_steer(c, o, &c->hooks);
    }
    if (st == KEEL_OK && c->hooks) {
        st = keel_session_set_hooks(c->session, c->hooks);
    }
    return st;
}

keel_status context_site(const struct context *c, const char *site, const char *layers, struct keel_capture_params *p, uint8_t **use)
{
    for (int i = 0; keel_site_name[i]; i++) {
        p->site = strcmp(site, keel_site_name[i]) == 0 ? (enum keel_site)i : p->site;
    }
    const bool tower = p->site >= KEEL_SITE_TOWER;
    if (tower && !c->images) {
        say(c, KEEL_LOG_ERROR, "--site %s is in the vision tower: give it by --mmproj", site);
        return KEEL_ERR_ARG;
    }
    const uint32_t n = tower ? keel_images_layers(c->images) : keel_model_info(c->model)->n_layers;
    *use = calloc(n, 1);
    p->layers = *use;
    p->images = c->images;
    return *use ? keel_layers_parse(layers, *use, n, &c->log) : KEEL_ERR_NO_MEMORY;
}

keel_status context_positions(const struct context *c, const char *text, bool responses, struct keel_capture_params *p)
{
    p->at = (struct keel_positions){ .kind = responses ? KEEL_AT_RESPONSE : KEEL_AT_LAST_PROMPT };
    if (p->site >= KEEL_SITE_TOWER) {
        p->at.kind = KEEL_AT_ALL;
    }
    return text ? keel_positions_parse(text, &p->at, &c->log) : KEEL_OK;
}

int context_close(struct context *c, keel_status st)
{
    progress_clear();
    if (st == KEEL_OK && c->dev && keel_device_validation_count(c->dev) > 0) {
        fprintf(stderr, "error: the validation layer sent %u messages\n", keel_device_validation_count(c->dev));
        st = KEEL_ERR_DEVICE;
    }
    keel_session_destroy(&c->session);
    keel_hooks_destroy(&c->hooks);
    keel_images_destroy(&c->images);
    keel_model_close(&c->model);
    keel_device_destroy(&c->dev);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "error: standard output could not be written\n");
        st = st == KEEL_OK ? KEEL_ERR_IO : st;
    }
    return exit_code(st);
}
