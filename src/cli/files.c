// SPDX-License-Identifier: MIT
// cli/files.c: what is wrong with the files of a command line, found before any work: an output that would overwrite an input or
// another output, or that cannot be written.
#include "cli.h"
#include "files.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_FILES = 256, MAX_PATH = 4096 };

// A file by device and inode; one that is yet to be made by its folder's and its name.
struct identity {
    dev_t dev;
    ino_t ino;
    char name[256]; // "": the file is there
};
struct file {
    const char *option, *text; // text: as given, for messages
    enum arg_file kind;
    struct identity id;
};
struct files {
    struct file at[MAX_FILES];
    size_t n;
};

// Folder of a path, "." for a bare name.
static void folder_of(char out[MAX_PATH], const char *path)
{
    const char *slash = strrchr(path, '/');
    const size_t len = slash == path ? 1 : slash ? (size_t)(slash - path) : 0;
    snprintf(out, MAX_PATH, "%.*s", slash ? (int)len : 1, slash ? path : ".");
}

// False for what can neither be overwritten nor made: pipes, devices, paths into nowhere.
static bool identify(const char *path, struct identity *id)
{
    struct stat s;
    char folder[MAX_PATH];
    const char *slash = strrchr(path, '/');
    *id = (struct identity){ 0 };
    if (stat(path, &s) == 0) {
        id->dev = s.st_dev;
        id->ino = s.st_ino;
        return S_ISREG(s.st_mode) || S_ISDIR(s.st_mode);
    }
    folder_of(folder, path);
    if (stat(folder, &s) != 0) {
        return false;
    }
    id->dev = s.st_dev;
    id->ino = s.st_ino;
    return snprintf(id->name, sizeof id->name, "%s", slash ? slash + 1 : path) > 0;
}

// Inputs may have a weight, a scale or layers behind their name: cut off until it is a file.
static bool identify_input(const char *text, struct identity *id)
{
    char path[MAX_PATH];
    struct stat s;
    snprintf(path, sizeof path, "%s", text);
    while (stat(path, &s) != 0) {
        size_t cut = strlen(path);
        while (cut > 0 && !strchr(":@,", path[cut - 1])) {
            cut--;
        }
        if (cut <= 1) {
            return false;
        }
        path[cut - 1] = '\0';
    }
    return identify(path, id);
}

static void add(struct files *f, const char *option, const char *text, enum arg_file kind)
{
    char path[MAX_PATH];
    struct identity id;
    if (!text || strcmp(text, "-") == 0 || f->n == MAX_FILES) {
        return;
    }
    snprintf(path, sizeof path, "%s", text);
    for (size_t len = strlen(path); len > 1 && path[len - 1] == '/'; len--) {
        path[len - 1] = '\0';
    }
    if (kind == ARG_IN ? identify_input(path, &id) : identify(path, &id)) {
        f->at[f->n++] = (struct file){ option, text, kind, id };
    }
}

static void add_list(struct files *f, const char *option, const struct arg_list *list, enum arg_file kind)
{
    for (size_t i = 0; i < list->n; i++) {
        add(f, option, list->at[i], kind);
    }
}

static void collect(struct files *f, const struct arg_command *c, const void *args)
{
    for (size_t i = 0; i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        const void *field = (const char *)args + o->offset;
        if (o->file != ARG_NO_FILE && o->type == ARG_LIST) {
            add_list(f, o->name, field, o->file);
        } else if (o->file != ARG_NO_FILE) {
            add(f, o->name, *(const char *const *)field, o->file);
        }
    }
    if (c->words_in && c->max_words) {
        add_list(f, c->word, (const void *)((const char *)args + c->positional), ARG_IN);
    }
}

static bool same(const struct identity *a, const struct identity *b)
{
    return a->dev == b->dev && a->ino == b->ino && strcmp(a->name, b->name) == 0;
}

static bool check_apart(const struct arg_command *c, const struct files *f)
{
    for (size_t i = 0; i < f->n; i++) {
        for (size_t k = 0; k < f->n; k++) {
            const struct file *out = &f->at[i], *other = &f->at[k];
            if (i == k || out->kind == ARG_IN || !same(&out->id, &other->id)) {
                continue;
            }
            if (other->kind == ARG_IN) {
                fprintf(stderr, "keel %s: %s %s would overwrite what %s reads; write to another file\n", c->name, out->option, out->text,
                        other->option);
            } else {
                fprintf(stderr, "keel %s: %s %s and %s are one file; give each its own\n", c->name, out->option, out->text, other->option);
            }
            return false;
        }
    }
    return true;
}

// The folder must be there and take files, and the name be none of a folder.
static bool check_writable(const char *path)
{
    struct stat s;
    char folder[MAX_PATH];
    const bool there = stat(path, &s) == 0;
    if (strcmp(path, "-") == 0 || (there && !S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode))) {
        return true;
    }
    folder_of(folder, path);
    errno = 0;
    if (there && S_ISDIR(s.st_mode)) {
        errno = EISDIR;
    } else if (stat(folder, &s) == 0 && !S_ISDIR(s.st_mode)) {
        errno = ENOTDIR;
    } else if (errno == 0 && access(folder, W_OK | X_OK) == 0) {
        return true;
    }
    fprintf(stderr, "error: %s: cannot be written: %s\n", path, strerror(errno));
    return false;
}

int check_files(const struct arg_command *c, const void *args)
{
    struct files *f = calloc(1, sizeof *f);
    int code = EXIT_DONE;
    if (!f) {
        fprintf(stderr, "keel %s: out of memory\n", c->name);
        return EXIT_FAILED;
    }
    collect(f, c, args);
    if (!check_apart(c, f)) {
        code = EXIT_USAGE;
    }
    for (size_t i = 0; code == EXIT_DONE && i < c->n_options; i++) {
        const struct arg_option *o = &c->options[i];
        const char *path = o->file == ARG_OUT ? *(const char *const *)(const void *)((const char *)args + o->offset) : NULL;
        if (path && !check_writable(path)) {
            code = EXIT_FAILED;
        }
    }
    free(f);
    return code;
}
