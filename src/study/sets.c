// SPDX-License-Identifier: MIT
// study/sets.c: probe sets, held against what their evaluation takes for granted, before anything runs: records of a faulty set would be
// refused, or measured wrong, when the trainings are done.
#include "eval.h"
#include "probes.h"
#include "run.h"

#include <stdlib.h>
#include <string.h>

#define PLACE(row) (row)->file, (unsigned long long)(row)->line

// What of a row says which cell it is in, and its partner; "" where it says nothing.
struct probe {
    const char *id, *domain, *modality, *twin;
};

static bool is_image(const struct probe *p)
{
    return strcmp(p->modality, "image") == 0;
}

static keel_status take(const struct keel_row *row, struct probe *p)
{
    keel_status st = KEEL_OK;
    const char *cluster = NULL;
    json_t *images = NULL;
    *p = (struct probe){ .domain = "", .twin = "" };
    KEEL_TRY(keel_row_str(row, "id", &p->id, NULL));
    KEEL_TRY(keel_row_opt_str(row, "domain", &p->domain, NULL));
    KEEL_TRY(keel_row_opt_str(row, "cluster", &cluster, NULL));
    KEEL_TRY(keel_row_opt_str(row, "twin", &p->twin, NULL));
    KEEL_TRY(keel_row_opt_array(row, "images", &images));
    p->modality = json_array_size(images) > 0 ? "image" : "text";
    KEEL_TRY(keel_row_opt_str(row, "modality", &p->modality, NULL));
    if (keel_domain_reserved(p->domain)) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"domain\" may not be \"%s\": reports call a group of domains so; give it another name",
                  PLACE(row), p->domain);
    }
out:
    return st;
}

// Lists a row under a name.
static keel_status list_name(json_t *names, const char *name, size_t i)
{
    json_t *rows = json_object_get(names, name);
    if (!rows) {
        rows = json_array();
        if (json_object_set_new(names, name, rows) != 0) {
            return KEEL_ERR_NO_MEMORY;
        }
    }
    return json_array_append_new(rows, json_integer((json_int_t)i)) == 0 ? KEEL_OK : KEEL_ERR_NO_MEMORY;
}

// A twin is the one row of the other modality with the id, or the "twin", that a row's "twin" says (eval/drift.c). A set may be part of a
// larger one, so a twin may be missing: that is counted, not refused.
static keel_status check_twin(const struct keel_row *row, const struct probe *p, const struct probe *all, json_t *const names[2], size_t *missing)
{
    keel_status st = KEEL_OK;
    const json_t *others = json_object_get(names[!is_image(p)], p->twin), *own = json_object_get(names[is_image(p)], p->twin);
    if (json_array_size(own) > 1) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"twin\" is \"%s\", as in another row of modality %s; twins are pairs of an image and a text",
                  PLACE(row), p->twin, is_image(p) ? "image" : "text");
    }
    if (json_array_size(others) > 1) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: \"twin\" is \"%s\", as in more than two rows; twins are pairs", PLACE(row), p->twin);
    }
    if (!others) {
        ++*missing;
        goto out;
    }
    const struct probe *partner = &all[json_integer_value(json_array_get(others, 0))];
    if (strcmp(partner->domain, p->domain) != 0) {
        KEEL_FAIL(row->log, KEEL_ERR_DATA, "%s:%llu: its twin \"%s\" is of domain \"%s\", not of \"%s\"", PLACE(row), partner->id, partner->domain,
                  p->domain);
    }
out:
    return st;
}

static keel_status check_rows(const struct keel_probes *set, struct probe *p)
{
    keel_status st = KEEL_OK;
    json_t *ids = json_object(), *names[2] = { json_object(), json_object() }; // names: of text rows, of image rows
    const size_t n = keel_probes_count(set);
    size_t missing = 0;
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(set, i);
        KEEL_TRY(take(&row, &p[i]));
        if (json_object_get(ids, p[i].id)) {
            KEEL_FAIL(set->log, KEEL_ERR_DATA, "%s:%llu: id \"%s\" stands in the file twice", PLACE(&row), p[i].id);
        }
        if (json_object_set_new(ids, p[i].id, json_true()) != 0) {
            KEEL_FAIL(set->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", set->file);
        }
        KEEL_TRY(list_name(names[is_image(&p[i])], p[i].id, i));
        KEEL_TRY(p[i].twin[0] && strcmp(p[i].twin, p[i].id) != 0 ? list_name(names[is_image(&p[i])], p[i].twin, i) : KEEL_OK);
    }
    for (size_t i = 0; i < n; i++) {
        const struct keel_row row = keel_probes_row(set, i);
        KEEL_TRY(p[i].twin[0] ? check_twin(&row, &p[i], p, names, &missing) : KEEL_OK);
    }
    if (missing > 0) {
        KEEL_WARN(set->log, "%s: %zu rows have a twin that is not in the file; they are left out of the modality gap", set->file, missing);
    }
out:
    json_decref(ids);
    json_decref(names[0]);
    json_decref(names[1]);
    return st;
}

// What the sets have of the domain and the modality that the study calls narrow.
struct narrow {
    const char *domain, *modality;
    bool domain_seen, seen;
    char seen_domains[200]; // for the message
};

static void note_narrow(struct narrow *narrow, const struct probe *p)
{
    const size_t len = strlen(narrow->seen_domains);
    char with_comma[128];
    snprintf(with_comma, sizeof with_comma, "%s%.100s", len ? ", " : "", p->domain);
    if (p->domain[0] && !strstr(narrow->seen_domains, p->domain) && len + strlen(with_comma) < sizeof narrow->seen_domains) {
        memcpy(narrow->seen_domains + len, with_comma, strlen(with_comma) + 1);
    }
    const bool in_domain = !narrow->domain || strcmp(p->domain, narrow->domain) == 0;
    narrow->domain_seen |= in_domain;
    narrow->seen |= in_domain && (!narrow->modality || strcmp(p->modality, narrow->modality) == 0);
}

static keel_status check_set(const struct study *s, const char *name, struct narrow *narrow)
{
    keel_status st = KEEL_OK;
    struct keel_probes set = { 0 };
    struct probe *p = NULL;
    char path[4200];
    keel_study_path(path, s->folder, name);
    KEEL_TRY(keel_probes_read(&set, path, NULL, true, s->log));
    p = calloc(keel_probes_count(&set), sizeof *p);
    if (!p) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    KEEL_TRY(check_rows(&set, p));
    for (size_t i = 0; i < keel_probes_count(&set); i++) {
        note_narrow(narrow, &p[i]);
    }
out:
    free(p);
    keel_probes_finish(&set);
    return st;
}

keel_status keel_study_check_sets(struct study *s)
{
    keel_status st = KEEL_OK;
    const struct study_file *f = s->file;
    const char *const sets[] = { f->eval.margin, f->eval.narrow, f->eval.kl, f->eval.slots };
    struct narrow narrow = { .domain = f->narrow_domain, .modality = f->narrow_modality };
    for (size_t i = 0; i < KEEL_COUNT(sets); i++) {
        KEEL_TRY(sets[i] ? check_set(s, sets[i], &narrow) : KEEL_OK);
    }
    if (!narrow.domain_seen) {
        KEEL_FAIL(s->log, KEEL_ERR_DATA, "%s: narrow_domain is \"%s\", but no probe of eval is of that domain; there are: %s", s->p->file,
                  narrow.domain, narrow.seen_domains[0] ? narrow.seen_domains : "none");
    }
    if (!narrow.seen) {
        KEEL_FAIL(s->log, KEEL_ERR_DATA, "%s: narrow_modality is \"%s\", but no probe of eval%s is of that modality", s->p->file, narrow.modality,
                  narrow.domain ? " in the narrow domain" : "");
    }
out:
    return st;
}
