// SPDX-License-Identifier: MIT
// cli/cmd_run.c: generates text, once for -p or turn by turn in a chat.
#include "cli.h"
#include "commands.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct run_args {
    struct common common;
    const char *prompt;
    struct arg_list image;
    bool chat, json, greedy;
    uint32_t n, top_k, repeat_last;
    double temp, top_p, min_p, repeat_penalty;
    uint64_t seed;
};

struct answer {
    int32_t *ids;
    size_t n;
    char *text;
    size_t text_len;
    bool ended;      // at EOS or end of turn, which is in neither ids nor text
    int32_t end_id;
    const char *stop; // "end", "length", "context", "interrupted"
    double prefill_seconds, seconds;
};

static struct keel_sample_params sampling(const struct run_args *a)
{
    return (struct keel_sample_params){
        .temperature = a->greedy ? 0.0f : (float)a->temp,
        .top_k = a->top_k,
        .top_p = (float)a->top_p,
        .min_p = (float)a->min_p,
        .repeat_penalty = (float)a->repeat_penalty,
        .repeat_last = a->repeat_last,
        .seed = a->seed,
    };
}

static bool keep(struct answer *r, int32_t id, const char *text, size_t len)
{
    // Grown by doubling at powers of two: an answer may have as many tokens as the context.
    if ((r->n & (r->n - 1)) == 0) {
        int32_t *ids = realloc(r->ids, (r->n ? r->n * 2 : 1) * sizeof *ids);
        if (!ids) {
            return false;
        }
        r->ids = ids;
    }
    char *all = realloc(r->text, r->text_len + len + 1);
    if (!all) {
        return false;
    }
    r->ids[r->n++] = id;
    memcpy(all + r->text_len, text, len);
    r->text = all;
    r->text_len += len;
    return true;
}

static void answer_free(struct answer *r)
{
    free(r->ids);
    free(r->text);
    *r = (struct answer){ 0 };
}

// Appends the prompt and generates until an end token, a->n tokens, a full context or a signal.
static keel_status generate(struct context *c, const struct run_args *a, uint32_t n_ctx, const struct keel_prompt *prompt,
                            struct answer *r)
{
    const struct keel_sample_params params = sampling(a);
    uint64_t start = now_ns();
    keel_status st = keel_session_append_images(c->session, prompt->ids, prompt->n, prompt->images, prompt->n_images);
    r->prefill_seconds = (double)(now_ns() - start) * 1e-9;
    r->stop = "length";
    start = now_ns();
    while (st == KEEL_OK && r->n < a->n) {
        int32_t id;
        size_t len = 0;
        if (stop_asked()) {
            r->stop = "interrupted";
            break;
        }
        st = keel_session_sample(c->session, &params, &id);
        if (st != KEEL_OK) {
            break;
        }
        if (keel_token_is_end(c->model, id)) {
            r->ended = true;
            r->end_id = id;
            r->stop = "end";
            break;
        }
        const char *text = keel_token_text(c->model, id, false, &len);
        if (!keep(r, id, text ? text : "", text ? len : 0)) {
            st = KEEL_ERR_NO_MEMORY;
            break;
        }
        if (!a->json) {
            fwrite(text ? text : "", 1, text ? len : 0, stdout);
            fflush(stdout);
        }
        if (keel_session_length(c->session) >= n_ctx) {
            r->stop = "context";
            break;
        }
        if (r->n < a->n) {
            st = keel_session_append(c->session, &id, 1);
        }
    }
    r->seconds = (double)(now_ns() - start) * 1e-9;
    return st;
}

static void report(const struct context *c, const struct run_args *a, size_t n_prompt, const struct answer *r)
{
    const double pp = r->prefill_seconds > 0 ? (double)n_prompt / r->prefill_seconds : 0;
    const double tg = r->seconds > 0 ? (double)r->n / r->seconds : 0;
    if (a->json) {
        json_t *ids = json_array();
        for (size_t i = 0; i < r->n; i++) {
            json_array_append_new(ids, json_integer(r->ids[i]));
        }
        print_json(stdout, json_pack("{s:o, s:o, s:I, s:I, s:s, s:f, s:f, s:f, s:f}", "text", json_text(r->text ? r->text : "", r->text_len),
                                     "ids", ids, "prompt_tokens", (json_int_t)n_prompt, "tokens", (json_int_t)r->n, "stop", r->stop,
                                     "prefill_seconds", r->prefill_seconds, "seconds", r->seconds, "prefill_tokens_per_second", pp,
                                     "tokens_per_second", tg));
    } else {
        putchar('\n');
        fflush(stdout);
    }
    if (strcmp(r->stop, "context") == 0) {
        say(c, KEEL_LOG_WARN, "the context is full; raise --ctx for a longer text");
    }
    say(c, KEEL_LOG_INFO, "%zu prompt tokens, %.1f tokens/s; %zu tokens, %.1f tokens/s", n_prompt, pp, r->n, tg);
}

// --- prompts -------------------------------------------------------------------------------------

// Images that the next prompt shows.
struct shown {
    const float **embeds;
    uint32_t *n_views;
    uint32_t n;
};

static keel_status show(const struct context *c, struct shown *s, const char *path)
{
    const float **embeds = realloc(s->embeds, (s->n + 1) * sizeof *embeds);
    s->embeds = embeds ? embeds : s->embeds;
    uint32_t *n_views = realloc(s->n_views, (s->n + 1) * sizeof *n_views);
    s->n_views = n_views ? n_views : s->n_views;
    if (!embeds || !n_views) {
        return KEEL_ERR_NO_MEMORY;
    }
    const keel_status st = keel_images_add(c->images, path, &s->embeds[s->n], &s->n_views[s->n]);
    s->n += st == KEEL_OK;
    return st;
}

// A prompt, or one user's turn. Images come first, unless the text says where: <image>.
static keel_status make_prompt(const struct context *c, const char *text, const struct shown *s, bool chat, struct keel_prompt *out)
{
    const struct keel_prompt_images list = { .embeds = s->embeds, .n_views = s->n_views, .n = s->n,
                                             .n_tokens = c->images ? keel_images_tokens(c->images) : 0 };
    const struct keel_prompt_images *const images = c->images ? &list : NULL;
    const uint32_t front = strstr(text, "<image>") ? 0 : s->n;
    const size_t n_text = strlen(text);
    char *all = malloc(n_text + 7 * (size_t)front + 1);
    if (!all) {
        return KEEL_ERR_NO_MEMORY;
    }
    text += chat && front ? strspn(text, " \t\r\n") : 0; // white space that the template strips from a content
    for (uint32_t i = 0; i < front; i++) {
        memcpy(all + 7 * (size_t)i, "<image>", 7);
    }
    strcpy(all + 7 * (size_t)front, text);
    const struct keel_message m = { .role = "user", .content = all };
    const keel_status st = chat ? keel_prompt_chat(c->model, &m, 1, true, images, out)
                                : keel_prompt_encode(c->model, all, strlen(all), images, out);
    free(all);
    return st;
}

static keel_status run_once(struct context *c, const struct run_args *a, uint32_t n_ctx, const struct shown *s)
{
    struct answer r = { 0 };
    struct keel_prompt p;
    keel_status st = make_prompt(c, a->prompt, s, a->chat, &p);
    if (st == KEEL_OK && p.n == 0) {
        say(c, KEEL_LOG_ERROR, "the prompt is empty and the model has no BOS token");
        st = KEEL_ERR_DATA;
    }
    if (st == KEEL_OK) {
        st = generate(c, a, n_ctx, &p, &r);
    }
    if (st == KEEL_OK) {
        report(c, a, p.n, &r);
    }
    answer_free(&r);
    keel_prompt_finish(&p);
    return st;
}

// --- chat ----------------------------------------------------------------------------------------

// What stands between the last answer and the next question: the rest of the last answer that is not in the session yet
// (its last token and the end of the turn), a newline, then the template of the next turn without its BOS.
static keel_status next_turn(const struct context *c, const struct answer *last, uint32_t seen, const char *text,
                             const struct shown *s, struct keel_prompt *out)
{
    struct keel_prompt turn = { 0 };
    int32_t *newline = NULL;
    size_t n_newline = 0;
    uint32_t at = 0;
    *out = (struct keel_prompt){ 0 };
    keel_status st = make_prompt(c, text, s, true, &turn);
    if (st == KEEL_OK) {
        st = keel_encode(c->model, "\n", 1, &(struct keel_encode_params){ .bos = false }, &newline, &n_newline);
    }
    int32_t *ids = st == KEEL_OK ? malloc((turn.n + n_newline + last->n + 1) * sizeof *ids) : NULL;
    if (ids) {
        for (size_t i = seen; i < last->n; i++) {
            ids[at++] = last->ids[i];
        }
        ids[at++] = keel_token_eot(c->model);
        memcpy(ids + at, newline, n_newline * sizeof *ids);
        at += (uint32_t)n_newline;
        const uint32_t skip = turn.n && turn.ids[0] == keel_token_bos(c->model);
        memcpy(ids + at, turn.ids + skip, (turn.n - skip) * sizeof *ids);
        for (uint32_t i = 0; i < turn.n_images; i++) {
            turn.images[i].at += at - skip;
        }
        *out = (struct keel_prompt){ .ids = ids, .n = at + turn.n - skip, .images = turn.images, .n_images = turn.n_images };
        turn.images = NULL;
    } else if (st == KEEL_OK) {
        st = KEEL_ERR_NO_MEMORY;
    }
    keel_prompt_finish(&turn);
    free(newline);
    return st;
}

// "/image FILE": shown with the next question. A file that cannot be read is said and forgotten.
static keel_status chat_image(struct context *c, const struct run_args *a, struct shown *s, char *path)
{
    static const char blank[] = " \t\r\n";
    path += strspn(path, blank);
    for (size_t n = strlen(path); n > 0 && strchr(blank, path[n - 1]); n--) {
        path[n - 1] = 0;
    }
    if (!*path) {
        say(c, KEEL_LOG_ERROR, "/image without a file; write /image FILE to show one with the next question");
        return KEEL_OK;
    }
    if (!c->images) {
        say(c, KEEL_LOG_ERROR, "/image needs a vision tower: start with --mmproj");
        return KEEL_OK;
    }
    keel_status st = show(c, s, path);
    if (st == KEEL_OK && context_encode_images(c, &a->common) != KEEL_OK) {
        s->n--;
    }
    return st;
}

static keel_status run_chat(struct context *c, const struct run_args *a, uint32_t n_ctx, struct shown *s)
{
    char *line = NULL;
    size_t cap = 0;
    keel_status st = KEEL_OK;
    struct answer last = { 0 };
    uint32_t base = 0; // session length when the last answer began
    const bool tty = isatty(STDIN_FILENO);
    while (st == KEEL_OK && !stop_asked()) {
        struct keel_prompt p = { 0 };
        if (tty) {
            fputs("> ", stderr);
        }
        stop_breaks_reads(true); // Ctrl-C at the prompt ends the chat
        const ssize_t len = getline(&line, &cap, stdin);
        stop_breaks_reads(false);
        if (len < 0) {
            break;
        }
        if (strncmp(line, "/image", 6) == 0 && strchr(" \t\r\n", line[6])) {
            st = chat_image(c, a, s, line + 6);
            continue;
        }
        if (strspn(line, " \t\r\n") == (size_t)len) {
            continue;
        }
        if (keel_session_length(c->session) == 0) {
            st = make_prompt(c, line, s, true, &p);
        } else {
            st = next_turn(c, &last, keel_session_length(c->session) - base, line, s, &p);
        }
        if (st == KEEL_ERR_DATA) { // images and their places do not agree: said; ask again
            st = KEEL_OK;
            continue;
        }
        if (st == KEEL_OK && keel_session_length(c->session) + p.n >= n_ctx) {
            say(c, KEEL_LOG_ERROR, "the conversation no longer fits %u tokens; start again or raise --ctx", n_ctx);
            st = KEEL_ERR_DATA;
        }
        if (st == KEEL_OK) {
            s->n = 0;
            answer_free(&last);
            base = keel_session_length(c->session) + p.n;
            st = generate(c, a, n_ctx, &p, &last);
        }
        if (st == KEEL_OK) {
            report(c, a, p.n, &last);
        }
        keel_prompt_finish(&p);
    }
    answer_free(&last);
    free(line);
    return st;
}

// Model, tower, device, then the images, and the weights last: a wrong path should not cost the start of a device, and tower
// and weights do not share its memory.
static keel_status load(struct context *c, const struct run_args *a, struct shown *s)
{
    keel_status st = context_open_model(c, &a->common);
    for (size_t i = 0; st == KEEL_OK && i < a->image.n; i++) {
        st = show(c, s, a->image.at[i]);
    }
    if (st == KEEL_OK) {
        st = context_open_device(c, &a->common);
    }
    if (st == KEEL_OK) {
        st = context_encode_images(c, &a->common);
    }
    if (st == KEEL_OK) {
        const uint64_t start = now_ns();
        st = keel_model_load(c->model, c->dev);
        c->load_ns = now_ns() - start;
    }
    return st;
}

static int run_run(const void *args)
{
    const struct run_args *a = args;
    struct context c = { 0 };
    struct shown s = { 0 };
    uint32_t n_ctx = a->common.ctx;
    if (a->image.n && !a->common.mmproj) {
        fprintf(stderr, "keel run: --image needs --mmproj, the model's vision tower\n");
        return EXIT_USAGE;
    }
    keel_status st = load(&c, a, &s);
    if (st == KEEL_OK) {
        if (n_ctx == 0) {
            n_ctx = keel_model_info(c.model)->context < 4096 ? keel_model_info(c.model)->context : 4096;
        }
        st = context_open_session(&c, &a->common, n_ctx);
    }
    if (st == KEEL_OK) {
        say(&c, KEEL_LOG_INFO, "loaded in %.1f s", (double)c.load_ns * 1e-9);
        st = a->prompt ? run_once(&c, a, n_ctx, &s) : run_chat(&c, a, n_ctx, &s);
    }
    free(s.embeds);
    free(s.n_views);
    return context_close(&c, st);
}

#define AT(field) offsetof(struct run_args, field)
static const struct arg_option options[] = {
    OPTION_MODEL,
    { .name = "--prompt", .brief = "-p", .type = ARG_STR, .offset = AT(prompt), .value = "TEXT",
      .help = "continue this text; without it a chat, one line a turn, Ctrl-D ends" },
    { .name = "--chat", .type = ARG_FLAG, .offset = AT(chat), .help = "put -p into the chat template" },
    { .name = "--tokens", .brief = "-n", .type = ARG_U32, .offset = AT(n), .value = "N", .def = "256", .min = 1, .max = 1 << 24,
      .help = "at most N tokens" },
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print {\"text\", \"ids\", \"tokens\", \"seconds\", ...}, not a stream" },
    OPTION_LORA,
    OPTION_STEER,
    { .type = ARG_HEAD, .help = "Images" },
    OPTIONS_IMAGES,
    { .name = "--image", .type = ARG_LIST, .offset = AT(image), .value = "F",
      .help = "show an image: at <image> in -p, else before the text; in a chat with the first turn" },
    { .type = ARG_HEAD, .help = "Sampling" },
    { .name = "--greedy", .type = ARG_FLAG, .offset = AT(greedy), .help = "always the likeliest token" },
    { .name = "--temp", .type = ARG_NUM, .offset = AT(temp), .value = "X", .def = "1.0", .min = 0, .max = 100,
      .help = "temperature; 0 is greedy" },
    { .name = "--top-k", .type = ARG_U32, .offset = AT(top_k), .value = "N", .def = "64", .min = 0, .max = 1 << 24,
      .help = "only the N likeliest tokens; 0: all" },
    { .name = "--top-p", .type = ARG_NUM, .offset = AT(top_p), .value = "X", .def = "0.95", .min = 0, .max = 1,
      .help = "only the likeliest tokens that sum to X; 1: all" },
    { .name = "--min-p", .type = ARG_NUM, .offset = AT(min_p), .value = "X", .def = "0", .min = 0, .max = 1,
      .help = "only tokens at least X times as likely as the likeliest" },
    { .name = "--repeat-penalty", .type = ARG_NUM, .offset = AT(repeat_penalty), .value = "X", .def = "1.0", .min = 0.01, .max = 100,
      .help = "above 1: tokens seen lately become less likely" },
    { .name = "--repeat-last", .type = ARG_U32, .offset = AT(repeat_last), .value = "N", .def = "64", .min = 0, .max = 1 << 24,
      .help = "how many tokens count as lately" },
    { .name = "--seed", .type = ARG_U64, .offset = AT(seed), .value = "N", .def = "1", .help = "same seed, same text" },
    OPTIONS_SESSION,
    OPTION_KV,
    OPTIONS_DEVICE,
    OPTIONS_LOG,
};
const struct arg_command cmd_run = {
    .name = "run", .summary = "generate text, or chat", .usage = "-m MODEL [--lora A[:SCALE]]... [--chat] [-p TEXT] [-n N]",
    .notes = "A prompt without --chat gets BOS. Generation stops at the end of the turn, at EOS, or after N tokens.\n"
             "In a chat a line \"/image FILE\" shows a file with the next question.",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct run_args), .run = run_run,
};
