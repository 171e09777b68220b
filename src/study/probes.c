// SPDX-License-Identifier: MIT
// study/probes.c: probe rows to tokens and scores. The prompt, a prefix and an answer are tokenized each by itself and put one
// after the other, as `score` and `train` do.
#include "probes.h"

#include "models.h"
#include "platform.h"

#include <stdlib.h>
#include <string.h>

#define MAX_TURNS 64 // training rows before a probe
#define PLACE(row) (row)->file, (unsigned long long)(row)->line

// --- rows ----------------------------------------------------------------------------------------

void keel_probes_finish(struct keel_probes *p)
{
    for (size_t i = 0; i < p->n_seq; i++) {
        keel_prompt_finish(&p->seq[i].prompt);
        free(p->seq[i].a);
        free(p->seq[i].b);
    }
    free(p->seq);
    free(p->line);
    json_decref(p->rows);
    *p = (struct keel_probes){ 0 };
}

size_t keel_probes_count(const struct keel_probes *p)
{
    return json_array_size(p->rows);
}

struct keel_row keel_probes_row(const struct keel_probes *p, size_t i)
{
    return (struct keel_row){ json_array_get(p->rows, i), p->file, p->line[i], p->log };
}

static keel_status check_row(const struct keel_row *row, bool need_id)
{
    keel_status st = KEEL_OK;
    const char *s = NULL;
    json_t *messages = NULL;
    if (need_id) {
        KEEL_TRY(keel_row_str(row, "id", &s, NULL));
    }
    KEEL_TRY(keel_row_opt_array(row, "messages", &messages));
    if (!messages) {
        KEEL_TRY(keel_row_str(row, "prompt", &s, NULL));
    }
out:
    return st;
}

// A chat is shown, and told apart from others, by its last message.
static void set_prompt(json_t *row)
{
    const json_t *messages = json_object_get(row, "messages");
    json_t *content = json_object_get(json_array_get(messages, json_array_size(messages) - 1), "content"), *part;
    struct keel_text text = { 0 };
    size_t i;
    if (json_object_get(row, "prompt")) {
        return;
    }
    json_array_foreach(content, i, part)
    {
        const char *s = json_string_value(json_object_get(part, "text"));
        keel_text_addf(&text, "%s", s ? s : "<image>");
    }
    if (json_is_string(content)) {
        json_object_set(row, "prompt", content);
    } else {
        json_object_set_new(row, "prompt", json_string(text.data ? text.data : ""));
    }
    keel_text_finish(&text);
}

static keel_status append_row(struct keel_probes *p, const struct keel_row *row)
{
    const size_t n = json_array_size(p->rows);
    if ((n & (n - 1)) == 0) { // grows at powers of two
        uint64_t *line = realloc(p->line, KEEL_MAX(2 * n, (size_t)1) * sizeof *line);
        if (!line) {
            return KEEL_ERR_NO_MEMORY;
        }
        p->line = line;
    }
    p->line[n] = row->line;
    set_prompt(row->object);
    return json_array_append(p->rows, row->object) == 0 ? KEEL_OK : KEEL_ERR_NO_MEMORY;
}

keel_status keel_probes_read(struct keel_probes *p, const char *file, const char *origin, bool need_id, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    *p = (struct keel_probes){ .rows = json_array(), .file = file, .log = log };
    KEEL_TRY(keel_map_open(&map, file, log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, file, log);
    for (;;) {
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        KEEL_TRY(check_row(&row, need_id));
        KEEL_TRY(keel_row_ask(&row, origin ? origin : file));
        KEEL_TRY(append_row(p, &row));
        json_decref(row.object);
        row.object = NULL;
    }
    if (keel_probes_count(p) == 0) {
        KEEL_FAIL(log, KEEL_ERR_DATA, "%s: no rows in it", file);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    return st;
}

keel_status keel_probes_write(const json_t *rows, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_file_out out = { 0 };
    size_t i;
    json_t *row;
    KEEL_TRY(keel_file_create(&out, path, log));
    json_array_foreach((json_t *)(uintptr_t)rows, i, row)
    {
        json_object_del(row, KEEL_ROW_ASK);
        json_dumpf(row, out.f, JSON_COMPACT | JSON_REAL_PRECISION(9)); // a failed write shows at commit
        fputc('\n', out.f);
    }
    KEEL_TRY(keel_file_commit(&out, log));
out:
    keel_file_abort(&out);
    return st;
}

static const char *domain_of(const json_t *row)
{
    const char *domain = json_string_value(json_object_get(row, "domain"));
    return domain ? domain : "";
}

static const char *modality_of(const json_t *row)
{
    const char *modality = json_string_value(json_object_get(row, "modality"));
    return modality ? modality : json_object_get(row, "images") ? "image" : "text";
}

// A text that two rows share if they are of one domain and modality.
static const char *cell_of(const json_t *row, char buf[256])
{
    snprintf(buf, 256, "%.120s\n%.120s", domain_of(row), modality_of(row));
    return buf;
}

static bool in_cell(const json_t *row, const struct keel_probe_cell *cell)
{
    const char *domain = domain_of(row);
    if (cell->modality[0] && strcmp(modality_of(row), cell->modality) != 0) {
        return false;
    }
    return strcmp(cell->domain, "all") == 0     ? true
           : strcmp(cell->domain, "other") == 0 ? !cell->narrow || strcmp(domain, cell->narrow) != 0
                                                : strcmp(domain, cell->domain) == 0;
}

keel_status keel_probes_keep(struct keel_probes *p, const struct keel_probe_cell *cell)
{
    keel_status st = KEEL_OK;
    json_t *kept = json_array();
    for (size_t i = 0; i < json_array_size(p->rows); i++) {
        if (in_cell(json_array_get(p->rows, i), cell)) {
            p->line[json_array_size(kept)] = p->line[i];
            json_array_append(kept, json_array_get(p->rows, i));
        }
    }
    json_decref(p->rows);
    p->rows = kept;
    if (keel_probes_count(p) == 0) {
        KEEL_FAIL(p->log, KEEL_ERR_DATA, "%s: has no probe of domain \"%s\"%s%s to watch", p->file, cell->domain,
                  cell->modality[0] ? " and modality " : "", cell->modality);
    }
out:
    return st;
}

// Round r takes one row of every cell that has more than r, in the order given.
static keel_status take_rounds(const json_t *rows, const size_t *order, size_t max_rows, size_t *which)
{
    json_t *seen = json_object(); // cell -> how many of its rows this round has passed
    size_t n = 0;
    for (json_int_t round = 0; seen && n < max_rows; round++) {
        json_object_clear(seen);
        for (size_t i = 0; i < json_array_size(rows) && n < max_rows; i++) {
            char buf[256];
            const char *cell = cell_of(json_array_get(rows, order[i]), buf);
            const json_int_t at = json_integer_value(json_object_get(seen, cell));
            json_object_set_new(seen, cell, json_integer(at + 1));
            if (at == round) {
                which[n++] = order[i];
            }
        }
    }
    const bool ok = seen != NULL;
    json_decref(seen);
    return ok ? KEEL_OK : KEEL_ERR_NO_MEMORY;
}

keel_status keel_probes_spread(const struct keel_probes *p, size_t max_rows, uint64_t seed, size_t **which, size_t *n)
{
    keel_status st = KEEL_OK;
    struct keel_rng rng = keel_rng_make(seed, 3000);
    const size_t all = keel_probes_count(p);
    size_t *order = calloc(all + 1, sizeof *order);
    *n = max_rows > 0 && max_rows < all ? max_rows : all;
    *which = calloc(all + 1, sizeof **which);
    if (!order || !*which || all > UINT32_MAX) {
        KEEL_FAIL(p->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", p->file);
    }
    for (size_t i = 0; i < all; i++) {
        (*which)[i] = order[i] = i;
    }
    if (*n == all) {
        goto out;
    }
    for (size_t i = all - 1; i > 0; i--) {
        const size_t j = keel_rng_below(&rng, (uint32_t)i + 1), keep = order[i];
        order[i] = order[j];
        order[j] = keep;
    }
    KEEL_TRY(take_rounds(p->rows, order, *n, *which));
out:
    free(order);
    return st;
}

// --- tokens --------------------------------------------------------------------------------------

keel_status keel_probe_prompt(const struct keel_measure *m, const struct keel_row *row, struct keel_prompt *out)
{
    keel_status st = KEEL_OK;
    json_t *ask = json_copy(json_object_get(row->object, KEEL_ROW_ASK)), *prompt = json_object_get(ask, "prompt");
    *out = (struct keel_prompt){ 0 };
    if (prompt && m->chat) {
        json_object_set_new(ask, "messages", json_pack("[{s:s, s:O}]", "role", "user", "content", prompt));
        json_object_del(ask, "prompt");
    }
    const json_t *messages = json_object_get(ask, "messages"), *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *role = json_string_value(json_object_get(last, "role"));
    if (role && strcmp(role, "user") != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: the last message must be the user's; what the model is to answer goes into \"prefix\"",
                  PLACE(row));
    }
    const struct keel_row asked = { .object = ask, .file = "", .log = row->log }; // paths start at the working folder
    st = keel_row_prompt(out, m->model, m->images, &asked, true);
    if (st != KEEL_OK) {
        KEEL_FAIL(row->log, st, "%s:%llu: the row's prompt or messages cannot be used (reason above)", PLACE(row));
    }
out:
    json_decref(ask);
    return st;
}

// Steals the prompt, also on errors.
static keel_status add_seq(struct keel_probes *p, struct keel_prompt *prompt, uint32_t n_prompt, uint32_t first)
{
    if (p->n_seq == p->cap) {
        const size_t cap = KEEL_MAX(p->cap * 2, (size_t)64);
        struct keel_probe_seq *q = realloc(p->seq, cap * sizeof *q);
        if (!q) {
            keel_prompt_finish(prompt);
            return KEEL_ERR_NO_MEMORY;
        }
        p->seq = q;
        p->cap = cap;
    }
    struct keel_probe_seq *s = &p->seq[p->n_seq++];
    *s = (struct keel_probe_seq){ .prompt = *prompt, .first = first, .n_prompt = n_prompt };
    *prompt = (struct keel_prompt){ 0 };
    s->a = calloc(keel_probe_count(s) + 1, sizeof *s->a);
    s->b = calloc(keel_probe_count(s) + 1, sizeof *s->b);
    return s->a && s->b ? KEEL_OK : KEEL_ERR_NO_MEMORY;
}

// Whether two sequences are the same but for the last token, which is not their only scored context: an answer of one token against
// another, mostly. The second then needs no pass of its own.
static bool differ_at_end(const struct keel_probe_seq *a, const struct keel_probe_seq *b)
{
    bool same = a->prompt.n == b->prompt.n && a->first == b->first && a->n_prompt == b->n_prompt && a->first > 1 && keel_probe_count(a) > 0 &&
                a->prompt.n_images == b->prompt.n_images;
    for (uint32_t i = 0; same && i < a->prompt.n_images; i++) {
        same = a->prompt.images[i].embeds == b->prompt.images[i].embeds; // the same file has the same tokens
    }
    return same && memcmp(a->prompt.ids, b->prompt.ids, (a->prompt.n - 1) * sizeof(int32_t)) == 0;
}

static keel_status append_ids(struct keel_prompt *prompt, const json_t *list)
{
    const size_t n = json_array_size(list);
    int32_t *ids = realloc(prompt->ids, (prompt->n + n + 1) * sizeof *ids);
    if (!ids) {
        return KEEL_ERR_NO_MEMORY;
    }
    prompt->ids = ids;
    for (size_t i = 0; i < n; i++) {
        ids[prompt->n++] = (int32_t)json_integer_value(json_array_get(list, i));
    }
    return KEEL_OK;
}

keel_status keel_probes_add(struct keel_probes *p, const struct keel_measure *m, const struct keel_row *row,
                            const struct keel_probe_parts *parts)
{
    keel_status st = KEEL_OK;
    struct keel_prompt prompt = { 0 };
    KEEL_TRY(keel_probe_prompt(m, row, &prompt));
    const uint32_t n_prompt = prompt.n;
    if (parts->prefix) { // put into the model's mouth: hooks take it for its response
        KEEL_TRY(keel_prompt_complete(m->model, &prompt, parts->prefix, strlen(parts->prefix)));
    }
    const uint32_t first = prompt.n;
    if (parts->text) {
        KEEL_TRY(keel_prompt_complete(m->model, &prompt, parts->text, strlen(parts->text)));
    }
    KEEL_TRY(append_ids(&prompt, parts->more));
    if (first == 0 || (parts->text && prompt.n == first)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"%s\" is empty", PLACE(row), first == 0 ? "prompt" : parts->name);
    }
    KEEL_TRY(add_seq(p, &prompt, n_prompt, first));
    struct keel_probe_seq *last = &p->seq[p->n_seq - 1];
    last->alternative = p->n_seq > 1 && !last[-1].alternative && differ_at_end(&last[-1], last);
out:
    keel_prompt_finish(&prompt);
    return st;
}

// --- running -------------------------------------------------------------------------------------

keel_status keel_probes_score(struct keel_probes *p, const struct keel_measure *m)
{
    keel_status st = KEEL_OK;
    size_t n_rows = 0;
    struct keel_score_row *rows = calloc(p->n_seq + 1, sizeof *rows);
    if (!rows) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < p->n_seq; i++) {
        struct keel_probe_seq *s = &p->seq[i];
        const struct keel_prompt *t = &s->prompt;
        if (s->alternative) {
            rows[n_rows - 1].alt = &t->ids[t->n - 1];
            rows[n_rows - 1].n_alt = 1;
            rows[n_rows - 1].alt_logprobs = &s->a[keel_probe_count(s) - 1];
            continue;
        }
        rows[n_rows++] = (struct keel_score_row){ .ids = t->ids, .n = t->n, .first = s->first, .logprobs = s->a, .images = t->images,
                                                  .n_images = t->n_images, .prompt = s->n_prompt };
    }
    KEEL_TRY(keel_session_score(m->session, rows, n_rows, m->progress, m->user));
    for (size_t i = 1; i < p->n_seq; i++) {
        if (p->seq[i].alternative) {
            memcpy(p->seq[i].a, p->seq[i - 1].a, (keel_probe_count(&p->seq[i]) - 1) * sizeof *p->seq->a);
        }
    }
out:
    free(rows);
    return st;
}

keel_status keel_probes_divergence(struct keel_probes *p, const struct keel_measure *m)
{
    struct keel_kl_row *rows = calloc(p->n_seq + 1, sizeof *rows);
    if (!rows) {
        return KEEL_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < p->n_seq; i++) {
        const struct keel_prompt *t = &p->seq[i].prompt;
        rows[i] = (struct keel_kl_row){ .ids = t->ids, .n = t->n, .first = p->seq[i].first, .kl = p->seq[i].a, .kl_reverse = p->seq[i].b,
                                        .images = t->images, .n_images = t->n_images };
    }
    const keel_status st = keel_session_kl(m->session, rows, p->n_seq, m->progress, m->user);
    free(rows);
    return st;
}

double keel_probe_sum(const struct keel_probe_seq *s)
{
    double sum = 0;
    for (uint32_t i = 0; i < keel_probe_count(s); i++) {
        sum += (double)s->a[i];
    }
    return sum;
}

// --- earlier turns -------------------------------------------------------------------------------

// Appends a training row or the probe itself to the turns of a chat.
static keel_status add_turns(json_t *chat, const struct keel_row *row)
{
    keel_status st = KEEL_OK;
    const json_t *ask = json_object_get(row->object, KEEL_ROW_ASK), *list = json_object_get(ask, "messages");
    const char *completion = NULL;
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_array_append(chat, json_array_get(list, i));
    }
    if (!list) {
        KEEL_TRY(keel_row_opt_str(row, "completion", &completion, NULL));
        json_array_append_new(chat, json_pack("{s:s, s:O}", "role", "user", "content", json_object_get(ask, "prompt")));
        if (completion) {
            json_array_append_new(chat, json_pack("{s:s, s:s}", "role", "assistant", "content", completion));
        }
    }
out:
    return st;
}

static keel_status add_plain(struct keel_text *text, const struct keel_row *row)
{
    keel_status st = KEEL_OK;
    const char *prompt, *completion = "";
    if (json_object_get(row->object, "messages")) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: a chat cannot stand before a plain prompt; set eval: prompts: chat", PLACE(row));
    }
    KEEL_TRY(keel_row_str(row, "prompt", &prompt, NULL));
    KEEL_TRY(keel_row_opt_str(row, "completion", &completion, NULL));
    keel_text_addf(text, "%s%s%s", text->len ? "\n\n" : "", prompt, completion);
out:
    return st;
}

// k different numbers below n, in the order drawn (Floyd).
static void draw_without_replacement(uint32_t *out, uint32_t k, uint32_t n, struct keel_rng *rng)
{
    for (uint32_t i = 0; i < k; i++) {
        const uint32_t top = n - k + i;
        uint32_t x = keel_rng_below(rng, top + 1);
        for (uint32_t j = 0; j < i; j++) {
            x = out[j] == x ? top : x;
        }
        out[i] = x;
    }
}

keel_status keel_probe_in_context(json_t **out, const struct keel_measure *m, const struct keel_row *row,
                                  const struct keel_probes *from, uint32_t k, uint64_t seed, uint64_t place)
{
    keel_status st = KEEL_OK;
    struct keel_rng rng = keel_rng_make(seed, 1000 + place);
    struct keel_text text = { 0 };
    uint32_t pick[MAX_TURNS];
    const bool chat = m->chat || json_object_get(row->object, "messages");
    json_t *turns = json_array(), *files = json_array(), *ask = json_object();
    k = KEEL_MIN(KEEL_MIN(k, (uint32_t)keel_probes_count(from)), MAX_TURNS);
    draw_without_replacement(pick, k, (uint32_t)keel_probes_count(from), &rng);
    *out = NULL;
    for (uint32_t i = 0; i <= k; i++) {
        const struct keel_row part = i < k ? keel_probes_row(from, pick[i]) : *row;
        KEEL_TRY(chat ? add_turns(turns, &part) : add_plain(&text, &part));
        json_array_extend(files, keel_row_files(part.object));
    }
    if (chat) {
        json_object_set(ask, "messages", turns);
    } else {
        json_object_set_new(ask, "prompt", json_string(text.data));
    }
    if (json_array_size(files) > 0) {
        json_object_set(ask, "images", files);
    }
    *out = json_copy(row->object);
    if (text.failed || json_object_set(*out, KEEL_ROW_ASK, ask) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_NO_MEMORY, "%s:%llu: out of memory", PLACE(row));
    }
out:
    if (st != KEEL_OK) {
        json_decref(*out);
        *out = NULL;
    }
    json_decref(turns);
    json_decref(files);
    json_decref(ask);
    keel_text_finish(&text);
    return st;
}
