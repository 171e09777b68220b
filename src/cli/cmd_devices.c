// SPDX-License-Identifier: MIT
// cli/cmd_devices.c: lists the Vulkan devices with limits and features as keel uses them, and their measured speed.
#include "cli.h"
#include "commands.h"

#include <stdlib.h>
#include <string.h>

struct devices_args {
    struct common common;
    bool json, no_measure;
};

static json_t *caps_json(const struct keel_caps *c)
{
    json_t *o = json_pack("{s:i, s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:I, s:I, s:I}", "index", (int)c->index, "name", c->name,
                          "driver", c->driver, "kind", c->kind, "uuid", c->uuid, "profile", c->profile, "api_major",
                          (int)c->api_major, "api_minor", (int)c->api_minor, "vendor_id", (json_int_t)c->vendor_id, "device_id",
                          (json_int_t)c->device_id, "driver_version", (json_int_t)c->driver_version);
    const struct {
        const char *name;
        uint64_t value;
    } number[] = {
        { "subgroup_size", c->subgroup_size }, { "max_workgroup", c->max_workgroup }, { "max_shared", c->max_shared },
        { "max_push", c->max_push }, { "max_bindings", c->max_bindings }, { "max_groups", c->max_groups },
        { "max_range", c->max_range }, { "max_buffer", c->max_buffer }, { "offset_align", c->offset_align },
        { "heap", c->heap }, { "heap_free", c->heap_free },
    };
    const struct {
        const char *name;
        bool value;
    } flag[] = {
        { "unified", c->unified }, { "host_cached", c->host_cached }, { "subgroup_arith", c->subgroup_arith },
        { "storage16", c->storage16 }, { "storage8", c->storage8 }, { "float16", c->float16 }, { "int8", c->int8 },
        { "soft_half", c->soft_half }, { "int_dot", c->int_dot }, { "int_dot_fast", c->int_dot_fast },
        { "timestamps", c->timestamps },
    };
    for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
        json_object_set_new(o, number[i].name, json_integer((json_int_t)number[i].value));
    }
    for (size_t i = 0; i < sizeof flag / sizeof flag[0]; i++) {
        json_object_set_new(o, flag[i].name, json_boolean(flag[i].value));
    }
    json_object_set_new(o, "coop", c->coop.m ? json_pack("[i, i, i]", (int)c->coop.m, (int)c->coop.n, (int)c->coop.k) : json_null());
    json_object_set_new(o, "timestamp_ns", json_real(c->timestamp_ns));
    json_object_set_new(o, "gflops", json_real(c->gflops));
    json_object_set_new(o, "gbps", json_real(c->gbps));
    json_object_set_new(o, "matvec_gbps", json_real(c->matvec_gbps));
    return o;
}

static void print_caps(const struct keel_caps *c)
{
    printf("%u  %s\n", c->index, c->name);
    printf("   driver      %s, Vulkan %u.%u, %s%s%s\n", c->driver, c->api_major, c->api_minor, c->kind,
           c->profile[0] ? ", clamped to " : "", c->profile);
    printf("   memory      %s, %s free, %s; one buffer %s, one binding %s\n", bytes_text(c->heap), bytes_text(c->heap_free),
           c->unified ? "shared with the host" : "its own", bytes_text(c->max_buffer), bytes_text(c->max_range));
    printf("   workgroup   %u invocations, %u B shared memory, %u B push constants, %u storage buffers, %u groups\n",
           c->max_workgroup, c->max_shared, c->max_push, c->max_bindings, c->max_groups);
    char coop[64] = "";
    if (c->coop.m) {
        snprintf(coop, sizeof coop, ", cooperative matrices %u × %u × %u", c->coop.m, c->coop.n, c->coop.k);
    }
    printf("   features    subgroup %u%s%s%s%s%s%s%s%s\n", c->subgroup_size, c->subgroup_arith ? ", subgroup sums" : "",
           c->storage16 ? ", 16-bit storage" : "", c->storage8 ? ", 8-bit storage" : "", c->float16 ? ", f16" : "",
           c->int8 ? ", int8" : "", c->int_dot_fast ? ", integer dot" : "", coop, c->timestamps ? ", timestamps" : "");
    if (c->gflops > 0) {
        printf("   measured    %.1f GFLOP/s fp32, %.1f GB/s copy, %.2f GB/s of 4-bit weights\n", c->gflops, c->gbps, c->matvec_gbps);
    }
}

// Opens device `index` to learn its limits as used and its speed. A device that cannot be opened is listed as the driver
// describes it; the reason was logged.
static struct keel_caps probe(const struct devices_args *a, const struct keel_caps *listed)
{
    char select[16];
    struct common common = a->common;
    struct context c = { .unprepared = true };
    struct keel_caps caps = *listed;
    snprintf(select, sizeof select, "%u", listed->index);
    common.device = select;
    if (context_open_device(&c, &common) == KEEL_OK) {
        if (!a->no_measure && keel_device_caps(c.dev)->matvec_gbps <= 0) {
            keel_device_measure(c.dev);
        }
        caps = *keel_device_caps(c.dev);
        caps.index = listed->index;
    }
    context_close(&c, KEEL_OK);
    return caps;
}

static int by_speed(const void *x, const void *y)
{
    const struct keel_caps *a = x, *b = y;
    const double na = keel_device_weight_ns(a), nb = keel_device_weight_ns(b);
    return na != nb ? (na < nb ? -1 : 1) : (int)a->index - (int)b->index;
}

static int devices_run(const void *args)
{
    const struct devices_args *a = args;
    const keel_log log = cli_log(&a->common);
    struct keel_caps list[16];
    size_t n = 0;
    const keel_status st = keel_device_list(list, 16, &n, &log);
    if (st != KEEL_OK) {
        return exit_code(st);
    }
    n = n < 16 ? n : 16;
    for (size_t i = 0; i < n; i++) {
        list[i] = probe(a, &list[i]);
    }
    qsort(list, n, sizeof list[0], by_speed);
    json_t *out = json_array();
    for (size_t i = 0; i < n; i++) {
        if (a->json) {
            json_array_append_new(out, caps_json(&list[i]));
        } else {
            print_caps(&list[i]);
        }
    }
    if (a->json) {
        print_json(stdout, json_incref(out));
    }
    json_decref(out);
    return EXIT_DONE;
}

#define AT(field) offsetof(struct devices_args, field)
static const struct arg_option options[] = {
    { .name = "--json", .type = ARG_FLAG, .offset = AT(json), .help = "print a list with every limit and feature" },
    { .name = "--no-measure", .type = ARG_FLAG, .offset = AT(no_measure), .help = "do not measure speeds" },
    { .name = "--caps", .type = ARG_STR, .offset = OPT_COMMON(profile), .value = "PROFILE",
      .choice = (const char *const[]){ "min", "rpi", "mali", "discrete", NULL },
      .help = "show limits clamped to a profile: min, rpi, mali, discrete" },
    OPTIONS_LOG,
};
const struct arg_command cmd_devices = {
    .name = "devices", .summary = "list Vulkan devices with limits, features and measured speed, the fastest first", .usage = "[--json]",
    .options = options, .n_options = sizeof options / sizeof options[0], .args_bytes = sizeof(struct devices_args),
    .run = devices_run,
};
