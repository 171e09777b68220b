// SPDX-License-Identifier: MIT
// cli/geometry_print.c: the result of `keel geometry` as tables for people. What a program reads is the JSON itself.
#include "geometry.h"

#include <stdio.h>

static double number(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

static const char *text(const json_t *o, const char *key)
{
    return json_string_value(json_object_get(o, key));
}

static int layer(const json_t *o)
{
    return (int)json_integer_value(json_object_get(o, "layer"));
}

static double element(const json_t *list, size_t i)
{
    return json_number_value(json_array_get(list, i));
}

static void print_adapter(const json_t *a)
{
    size_t i;
    json_t *l;
    printf("\n%s\nlayer  module        rank  |dW| Frobenius  %% of |W|  |dW| spectral  stable rank\n", text(a, "adapter"));
    json_array_foreach(json_object_get(a, "layers"), i, l) {
        printf("%5d  %-12s %5d %15.6g %9.3g %14.6g %12.3f\n", layer(l), text(l, "module"), (int)number(l, "rank"), number(l, "frobenius"),
               100 * number(l, "relative"), number(l, "spectral"), number(l, "stable_rank"));
    }
}

static void print_overlap(const json_t *o)
{
    size_t i;
    json_t *l;
    const json_t *of = json_object_get(o, "of");
    printf("\ndW of %s and %s\nlayer  module        ranks      cosine  overlap in  (random)  overlap out  (random)\n",
           json_string_value(json_array_get(of, 0)), json_string_value(json_array_get(of, 1)));
    json_array_foreach(json_object_get(o, "layers"), i, l) {
        const json_t *rank = json_object_get(l, "rank");
        printf("%5d  %-12s %4.0f %4.0f %9.4f %11.4f %9.4f %12.4f %9.4f\n", layer(l), text(l, "module"), element(rank, 0), element(rank, 1),
               number(l, "cosine"), number(l, "in"), number(l, "random_in"), number(l, "out"), number(l, "random_out"));
    }
}

static void print_shift(const json_t *s)
{
    size_t i, k;
    json_t *l, *channel;
    printf("\nshift by %s on %s\nlayer  components for 50/80/90/95 %%  participation  mean shift  %% of median norm  massive channels\n",
           text(s, "adapter"), text(s, "data"));
    json_array_foreach(json_object_get(s, "layers"), i, l) {
        const json_t *c = json_object_get(l, "components"), *massive = json_object_get(l, "massive");
        printf("%5d  %7d %6d %6d %6d %14.3f %11.4g %17.3g  ", layer(l), (int)element(c, 0), (int)element(c, 1), (int)element(c, 2),
               (int)element(c, 3), number(l, "participation"), number(l, "mean_shift"), 100 * number(l, "mean_shift") / number(l, "median_norm"));
        json_array_foreach(massive, k, channel) {
            printf("%s%d", k ? " " : "", (int)json_integer_value(channel));
        }
        printf((size_t)number(l, "n_massive") > json_array_size(massive) ? " ...\n" : "\n");
    }
}

static void print_angles(const json_t *a)
{
    size_t i;
    json_t *l;
    const json_t *of = json_object_get(a, "of");
    printf("\nspaces of %s and %s\nlayer  directions  overlap  (random)  largest cosine  smallest\n", json_string_value(json_array_get(of, 0)),
           json_string_value(json_array_get(of, 1)));
    json_array_foreach(json_object_get(a, "layers"), i, l) {
        const json_t *c = json_object_get(l, "cosines");
        printf("%5d  %10zu %8.4f %9.4f %15.4f %9.4f\n", layer(l), json_array_size(c), number(l, "overlap"), number(l, "random"), element(c, 0),
               element(c, json_array_size(c) - 1));
    }
}

static void print_probes(const json_t *p)
{
    size_t i, j, k;
    json_t *l, *set, *row;
    const json_t *sets = json_object_get(p, "sets");
    printf("\nAUC of linear probes; trained on (rows) and tested on:\n");
    json_array_foreach(sets, i, set) {
        printf("  %zu: %s\n", i + 1, json_string_value(set));
    }
    printf("layer  trained on");
    for (i = 0; i < json_array_size(sets); i++) {
        printf(" %7zu", i + 1);
    }
    printf("  shuffled labels\n");
    json_array_foreach(json_object_get(p, "layers"), i, l) {
        json_array_foreach(json_object_get(l, "auc"), j, row) {
            printf("%5d %11zu", layer(l), j + 1);
            for (k = 0; k < json_array_size(row); k++) {
                printf(" %7.3f", element(row, k));
            }
            printf(" %16.3f\n", element(json_object_get(l, "shuffled"), j));
        }
    }
}

void geometry_print(const json_t *result)
{
    static const struct {
        const char *section;
        void (*print)(const json_t *item);
    } parts[] = { { "adapters", print_adapter }, { "overlaps", print_overlap }, { "shifts", print_shift }, { "angles", print_angles } };
    size_t i;
    json_t *item;
    for (size_t k = 0; k < sizeof parts / sizeof parts[0]; k++) {
        json_array_foreach(json_object_get(result, parts[k].section), i, item) {
            parts[k].print(item);
        }
    }
    if (json_object_get(result, "probes")) {
        print_probes(json_object_get(result, "probes"));
    }
}
