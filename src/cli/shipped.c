// SPDX-License-Identifier: MIT
// cli/shipped.c: finds the models that come with keel by their name. KEEL_DATA_DIR is where meson installs them,
// KEEL_SOURCE_DIR the source tree of this build.
#include "cli.h"

#include <string.h>
#include <unistd.h>

enum { MAX_PATH = 4096 };

// Folder of the running program without the last slash; empty where the system does not tell.
static void program_dir(char dir[MAX_PATH])
{
    const ssize_t n = readlink("/proc/self/exe", dir, MAX_PATH - 1);
    dir[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(dir, '/');
    *(slash ? slash : dir) = '\0';
}

// The first place that holds the file: beside an installed program (also one that was moved), where meson installs, the source tree.
static bool find(char path[MAX_PATH], const char *name, const char *file)
{
    char program[MAX_PATH];
    program_dir(program);
    for (int i = 0; i < 3; i++) {
        int n = -1;
        switch (i) {
        case 0: n = program[0] ? snprintf(path, MAX_PATH, "%s/../share/keel/%s/%s", program, name, file) : -1; break;
        case 1: n = snprintf(path, MAX_PATH, "%s/%s/%s", KEEL_DATA_DIR, name, file); break;
        default: n = snprintf(path, MAX_PATH, "%s/models/%s/%s", KEEL_SOURCE_DIR, name, file); break;
        }
        if (n > 0 && n < MAX_PATH && access(path, R_OK) == 0) {
            return true;
        }
    }
    return false;
}

const char *shipped_golden(void)
{
    static char path[MAX_PATH];
    return find(path, "clerk", "golden.json") ? path : NULL;
}

void shipped_resolve(struct common *o)
{
    static char model[MAX_PATH], mmproj[MAX_PATH];
    if (!o->model || strcmp(o->model, "clerk") != 0 || access(o->model, F_OK) == 0) {
        return; // a user's own file of that name goes first
    }
    if (!o->mmproj && find(mmproj, "clerk", "mmproj-clerk.gguf")) {
        o->mmproj = mmproj;
    }
    if (find(model, "clerk", "clerk.gguf")) {
        o->model = model;
    }
}
