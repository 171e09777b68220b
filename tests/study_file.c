// SPDX-License-Identifier: MIT
// tests/study_file.c: study files right and wrong; every fault is named with its line and key.
#include "formats_util.h"

#include "study_file.h"

#include <math.h>

#define HEAD "name: n\ntrain:\n  data: [{file: a.jsonl}]\n"
#define TAIL "eval: {margin: p.jsonl}\n"

static keel_status parse(struct study_file **f, const char *text, struct memory_log *m)
{
    uint8_t *copy = exact_copy(text, strlen(text));
    memory_log_init(m);
    const keel_status st = keel_study_parse(f, copy, strlen(text), "s.yaml", &m->log);
    free(copy);
    return st;
}

static void test_defaults(void **state)
{
    struct study_file *f;
    struct memory_log m;
    (void)state;
    assert_int_equal(parse(&f, HEAD TAIL, &m), KEEL_OK);
    assert_string_equal(f->name, "n");
    assert_null(f->model);
    assert_int_equal(f->seed, 1);
    assert_int_equal(f->train.data_count, 1);
    assert_string_equal(f->train.data[0].file, "a.jsonl");
    assert_true(f->train.data[0].weight == 1 && f->train.lr == 2e-4 && f->train.grad_clip == 1 && f->train.epochs == 1);
    assert_true(f->train.rank == 16 && f->train.batch == 4 && f->train.accum == 1 && f->train.seq_len == 512);
    assert_string_equal(f->train.targets, "all");
    assert_string_equal(f->train.schedule, "constant");
    assert_string_equal(f->eval.margin, "p.jsonl");
    assert_true(!f->pan_and_scan && !f->eval.kl && !f->eval.narrow && f->eval.answer_tokens == 16 && f->eval.examples == 0);
    assert_true(isnan(f->budget.kl_mean) && isnan(f->budget.margin_drop) && isnan(f->budget.flip_rate));
    keel_study_free(&f);
    assert_null(f);
}

static void test_mitigations(void **state)
{
    struct study_file *f;
    struct memory_log m;
    (void)state;
    assert_int_equal(parse(&f,
                           HEAD "  layers: 0-3\n  kl_data: k.jsonl\n  kl_rows: 2\n  constrain: [0.5, 2, 0.1]\n  lisa_data: l.jsonl\n"
                                "  lisa_steps: [1, 9]\n  lisa_rho: 0.5\n  steer: [\"v.gguf:2\", w.gguf]\n" TAIL
                                "stages:\n- {name: a, train: {steps: 3, kl_weight: 0}}\n", &m), KEEL_OK);
    const struct study_train *t = &f->train, *own = &f->stage[0].train;
    assert_string_equal(t->layers, "0-3");
    assert_string_equal(t->kl_data, "k.jsonl");
    assert_true(t->kl_weight == 1 && t->kl_rows == 2 && t->constrain[1] == 2 && t->constrain[2] == 0.1);
    assert_true(t->lisa_align == 1 && t->lisa_task == 9 && t->lisa_rho == 0.5 && t->n_steer == 2);
    assert_string_equal(t->steer[1], "w.gguf");
    assert_true(own->kl_weight == 0 && own->kl_rows == 2 && own->n_steer == 2 && own->lisa_task == 9);
    keel_study_free(&f);
}

static void test_values(void **state)
{
    struct study_file *f;
    struct memory_log m;
    (void)state;
    assert_int_equal(parse(&f,
                           "name: n\nmodel: m.gguf\npan_and_scan: true\nseed: 7\nnarrow_domain: colour\n"
                           "train:\n  data: [{file: a, weight: 0.25}, {file: b}]\n  rank: 8\n  alpha: 32\n  targets: attn_q,ffn_down\n"
                           "  lr: 1e-3\n  schedule: cosine\n  warmup: 5\n  steps: 60\n  batch: 2\n  accum: 3\n  seq_len: 64\n"
                           "  weight_decay: 0.5\n  grad_clip: 0\n"
                           "eval: {margin: p, narrow: h, kl: k, answer_tokens: 8, examples: 3}\n"
                           "budget: {kl_mean: 0.5, margin_drop: 0, flip_rate: 0.1}\n",
                           &m),
                     KEEL_OK);
    assert_true(f->pan_and_scan && f->seed == 7 && f->train.data_count == 2 && f->train.data[0].weight == 0.25 && f->train.data[1].weight == 1);
    assert_true(f->train.rank == 8 && f->train.alpha == 32 && f->train.lr == 1e-3 && f->train.warmup == 5 && f->train.steps == 60);
    assert_true(f->train.batch == 2 && f->train.accum == 3 && f->train.seq_len == 64 && f->train.weight_decay == 0.5);
    assert_true(f->train.grad_clip == 0);    // a written zero is no missing value
    assert_true(f->budget.margin_drop == 0); // and a limit of zero is a limit
    assert_true(f->budget.kl_mean == 0.5 && f->budget.flip_rate == 0.1 && f->eval.answer_tokens == 8 && f->eval.examples == 3);
    assert_string_equal(f->narrow_domain, "colour");
    assert_string_equal(f->train.targets, "attn_q,ffn_down");
    keel_study_free(&f);
}

static void assert_run(const struct study_file *f, size_t i, uint32_t rank, double mixture, uint64_t seed)
{
    assert_true(i < f->n_runs);
    if (f->run[i].rank != rank || f->run[i].mixture != mixture || f->run[i].seed != seed) {
        fail_msg("run %zu: rank %u, mixture %g, seed %llu", i, f->run[i].rank, f->run[i].mixture, (unsigned long long)f->run[i].seed);
    }
}

#define MIXED "name: n\nseed: 9\ntrain:\n  data: [{file: a}]\n  filler: g\n  rank: 8\neval: {slots: s, context_rows: 3, prompts: chat}\n"

static void test_sweeps(void **state)
{
    struct study_file *f;
    struct memory_log m;
    (void)state;
    assert_int_equal(parse(&f, MIXED, &m), KEEL_OK);
    assert_true(!f->sweep && f->n_runs == 1 && f->eval.chat && f->eval.context_rows == 3);
    assert_run(f, 0, 8, 1, 9);
    keel_study_free(&f);
    assert_int_equal(parse(&f, MIXED "sweep: {rank: [4, 16], mixture: [0.5, 1], seed: [1, 2]}\n", &m), KEEL_OK);
    assert_true(f->sweep && f->n_runs == 8);
    assert_run(f, 0, 4, 0.5, 1);
    assert_run(f, 1, 4, 0.5, 2);
    assert_run(f, 2, 4, 1, 1);
    assert_run(f, 7, 16, 1, 2);
    keel_study_free(&f);
    // Axes: ranks with the mixture of `train`, mixtures with its rank; what both name is run once.
    assert_int_equal(parse(&f, MIXED "sweep: {combine: axes, rank: [4, 8], mixture: [0.1, 1]}\n", &m), KEEL_OK);
    assert_int_equal(f->n_runs, 3);
    assert_run(f, 0, 4, 1, 9);
    assert_run(f, 1, 8, 1, 9);
    assert_run(f, 2, 8, 0.1, 9);
    keel_study_free(&f);
    assert_int_equal(parse(&f, MIXED "sweep: {seed: [3, 3, 4]}\n", &m), KEEL_OK);
    assert_int_equal(f->n_runs, 2); // a seed twice would count one run twice
    assert_run(f, 1, 8, 1, 4);
    keel_study_free(&f);
}

#define CHAIN "name: n\ntrain:\n  data: [{file: a}]\n  filler: g\n  mixture: 0.5\n  rank: 8\n  alpha_per_rank: 1\n  steps: 9\neval: {slots: s}\nstages:\n"

static void test_stages(void **state)
{
    struct study_file *f;
    struct memory_log m;
    (void)state;
    assert_int_equal(parse(&f,
                           CHAIN "  - {name: attack, train: {}, watch: {above: 0.5, every: 3}}\n"
                                 "  - {name: repair, train: {data: [{file: b}], lr: 0.01, steps: 4}}\n"
                                 "  - {name: on-top, from: attack, adapter: stack, train: {rank: 2, epochs: 3}}\n"
                                 "  - {name: steered, from: attack, steer: ['v.gguf@1,op=add', w.gguf], coef: [-1, -2.5]}\n"
                                 "  - {name: plain, from: base, steer: ['v:1.5@2']}\n"
                                 "  - {name: scaled, scale: [0.25, 1]}\n"
                                 "  - {name: map, steer: ['v,at=all'], coef: [5, -3], percent: true, layers: 0-3, probes: 7}\n"
                                 "sweep: {rank: [4, 8]}\n",
                           &m),
                     KEEL_OK);
    assert_int_equal(f->n_stages, 9);
    const struct study_stage *s = f->stage;
    assert_true(s[0].kind == STUDY_TRAIN && s[0].from == STUDY_NO_STAGE && !s[0].stack && !s[0].own_rank && !s[0].own_mixture);
    assert_true(s[0].train.rank == 8 && s[0].train.steps == 9 && s[0].train.mixture == 0.5 && s[0].watch.every == 3);
    assert_true(s[0].watch.above == 0.5 && isnan(s[0].watch.below) && s[0].watch.probes == 32);
    // Data of its own come without the filler and the mixture of `train`; the rest is that of `train`.
    assert_true(s[1].from == 0 && !s[1].stack && s[1].own_mixture && s[1].train.mixture == 1 && !s[1].train.filler);
    assert_true(s[1].train.lr == 0.01 && s[1].train.steps == 4 && s[1].train.rank == 8 && s[1].watch.every == 0);
    assert_string_equal(s[1].train.data[0].file, "b");
    assert_true(s[2].from == 0 && s[2].stack && s[2].own_rank && s[2].train.rank == 2 && s[2].train.steps == 0 && s[2].train.epochs == 3);
    assert_string_equal(s[3].name, "steered--1");
    assert_string_equal(s[4].group, "steered");
    assert_true(s[4].kind == STUDY_STEER && s[4].from == 0 && s[4].n_steer == 2 && s[4].value == -2.5);
    assert_string_equal(s[4].steer[0], "v.gguf:-2.5@1,op=add");
    assert_string_equal(s[4].steer[1], "w.gguf:-2.5");
    assert_true(s[5].from == STUDY_NO_STAGE && isnan(s[5].value));
    assert_string_equal(s[5].steer[0], "v:1.5@2");
    assert_true(s[6].kind == STUDY_SCALE && s[6].from == 2 && s[6].value == 0.25); // the last stage that trains
    assert_string_equal(s[7].name, "scaled-1");
    const struct study_map *map = &s[8].map;
    assert_true(s[8].kind == STUDY_MAP && s[8].percent && map->n_coef == 2 && map->coef[0] == -3 && map->coef[1] == 5 && map->probes == 7);
    assert_string_equal(map->layers, "0-3");
    assert_string_equal(s[8].steer[0], "v,at=all");
    keel_study_free(&f);
}

static void test_faults(void **state)
{
    static const struct {
        const char *text, *where, *what;
    } cases[] = {
        { HEAD "  kl_weight: 2\n" TAIL, "s.yaml:4", "kl_data" },
        { HEAD "  kl_rows: 2\n" TAIL, "s.yaml:4", "kl_data" },
        { HEAD "  guard: [kl_mean<=1]\n" TAIL, "s.yaml:4", "monitor" },
        { HEAD "  monitor_every: 5\n" TAIL, "s.yaml:4", "rows of monitor" },
        { HEAD "  lisa_steps: [1, 2]\n" TAIL, "s.yaml:4", "lisa_data" },
        { HEAD "  constrain: [1, 2]\n" TAIL, "s.yaml:4", "constrain" },
        { HEAD "  constrain: [1, 2, -1]\n" TAIL, "s.yaml:4", "range" },
        { "", "s.yaml:", "s.yaml" },
        { "just text\n", "s.yaml:1:", "" },
        { "name: n\n" TAIL, "s.yaml:2:", "train" },
        { HEAD, "s.yaml:", "eval" },
        { HEAD "  bogus: 3\n" TAIL, "s.yaml:4:", "bogus" },
        { HEAD TAIL "more: 1\n", "s.yaml:5:", "more" },
        { HEAD "  rank: many\n" TAIL, "s.yaml:4:", "rank" },
        { HEAD "  # rank: 1\n  rank: 0\n" TAIL, "s.yaml:5:", "rank" },
        { HEAD "  rank: -1\n" TAIL, "s.yaml:4:", "rank" },
        { HEAD "  batch: 99999999999999999999\n" TAIL, "s.yaml:4:", "batch" },
        { HEAD "  batch: 4294967297\n" TAIL, "s.yaml:4:", "batch" },
        { HEAD "  lr: nan\n" TAIL, "s.yaml:4:", "lr" },
        { HEAD "  lr: 1e999\n" TAIL, "s.yaml:4:", "lr" },
        { HEAD "  epochs: 0\n" TAIL, "s.yaml:4:", "epochs" },
        { HEAD "  schedule: cosinus\n" TAIL, "s.yaml:4:", "schedule" },
        { HEAD "  targets: attn_q,attn\n" TAIL, "s.yaml:4:", "targets" },
        { HEAD "  targets: attn_q,\n" TAIL, "s.yaml:4:", "targets" },
        { "name: n\ntrain:\n  data: []\n" TAIL, "s.yaml:3:", "data" },
        { "name: n\ntrain:\n  data: [{weight: 1}]\n" TAIL, "s.yaml:3:", "file" },
        { "name: n\ntrain:\n  data: [{file: a, weight: -1}]\n" TAIL, "s.yaml:3:", "weight" },
        { HEAD "eval: {answer_tokens: 4}\n", "s.yaml:4:", "nothing to measure" },
        { HEAD "eval:\n  margin: p\n  answer_tokens: 0\n", "s.yaml:6:", "answer_tokens" },
        { HEAD TAIL "budget: {kl_mean: 1}\n", "s.yaml:5:", "eval: kl" },
        { HEAD TAIL "budget: {flip_rate: 2}\n", "s.yaml:5:", "flip_rate" },
        { HEAD TAIL "budget: {margin_drop: nan}\n", "s.yaml:5:", "margin_drop" },
        { HEAD "  mixture: 0.5\n" TAIL, "s.yaml:4:", "filler" },
        { HEAD "  filler: g\n  mixture: 1.5\n" TAIL, "s.yaml:5:", "mixture" },
        { HEAD "  alpha: 8\n  alpha_per_rank: 1\n" TAIL, "s.yaml:5:", "one of them" },
        { HEAD "  alpha_per_rank: 0\n" TAIL, "s.yaml:4:", "alpha_per_rank" },
        { HEAD TAIL "sweep: {mixture: [0.5]}\n", "s.yaml:5:", "filler" },
        { HEAD "  rank: 4\n" TAIL "sweep:\n  rank: [4, 0]\n", "s.yaml:7:", "rank" },
        { HEAD TAIL "sweep: {rank: []}\n", "s.yaml:5:", "rank" },
        { HEAD TAIL "sweep: {rank: [4], combine: all}\n", "s.yaml:5:", "axes" },
        { HEAD TAIL "sweep: {combine: axes}\n", "s.yaml:5:", "nothing to vary" },
        { HEAD TAIL "sweep: {width: [4]}\n", "s.yaml:5:", "width" },
        { HEAD "eval: {margin: p, context_rows: 2}\n", "s.yaml:4:", "slots" },
        { HEAD "eval: {margin: p, prompts: raw}\n", "s.yaml:4:", "plain or chat" },
        { HEAD "eval: {margin: p, kv: q4_0}\n", "s.yaml:4:", "f32, f16 or q8_0" },
        { "name: n\ntrain: {lr: 1e-3}\n" TAIL, "s.yaml:2:", "no data" },
        { HEAD TAIL "stages: []\n", "s.yaml:5:", "stages" },
        { CHAIN " - {name: a, train: {}, colour: 1}\n", "s.yaml:11:", "colour" },
        { CHAIN " - {name: a}\n", "s.yaml:11:", "one of train" },
        { CHAIN " - {name: a, train: {}, scale: [1]}\n", "s.yaml:11:", "one of train" },
        { CHAIN " - {name: a b, train: {}}\n", "s.yaml:11:", "letters" },
        { CHAIN " - {name: base, train: {}}\n", "s.yaml:11:", "base" },
        { CHAIN " - {name: a, train: {}}\n - {name: a, train: {}}\n", "s.yaml:1", "earlier" },
        { CHAIN " - {name: a, train: {}}\n - name: b\n   from: c\n   train: {}\n", "s.yaml:13:", "c is no earlier stage" },
        { CHAIN " - {name: a, scale: [0.5]}\n", "s.yaml:11:", "no adapter to scale" },
        { CHAIN " - {name: a, train: {}}\n - {name: b, scale: [0.5, 0.5]}\n", "s.yaml:12:", "one name" },
        { CHAIN " - {name: a, train: {}}\n - {name: b, scale: [99]}\n", "s.yaml:12:", "out of range" },
        { CHAIN " - {name: a, train: {}}\n - name: b\n   train: {rank: 4}\n", "s.yaml:13:", "stack" },
        { CHAIN " - {name: a, adapter: stack, train: {}}\n", "s.yaml:11:", "base model" },
        { CHAIN " - {name: a, train: {}}\n - {name: b, adapter: merge, train: {}}\n", "s.yaml:12:", "continue or stack" },
        { CHAIN " - {name: a, from: base, steer: ['v:2@1'], coef: [1]}\n", "s.yaml:11:", "one of them" },
        { CHAIN " - {name: a, train: {}, coef: [1]}\n", "s.yaml:11:", "steer" },
        { CHAIN " - {name: a, train: {}, layers: 0-1}\n", "s.yaml:11:", "stages that steer" },
        { HEAD TAIL "stages:\n - {name: a, from: base, steer: [v], layers: 0-1, coef: [1]}\n", "s.yaml:6:", "eval: slots" },
        { CHAIN " - {name: a, from: base, steer: [v], probes: 3}\n", "s.yaml:11:", "a map" },
        { CHAIN " - {name: a, from: base, steer: [v], percent: true}\n", "s.yaml:11:", "coef" },
        { CHAIN " - {name: a, from: base, steer: [v], layers: 0-1}\n", "s.yaml:11:", "coef" },
        { CHAIN " - {name: a, from: base, steer: [v, w], coef: [1], layers: 0-1}\n", "s.yaml:11:", "one direction" },
        { CHAIN " - {name: a, from: base, steer: ['v@1'], coef: [1], layers: 0-1}\n", "s.yaml:11:", "layers in steer" },
        { CHAIN " - {name: a, from: base, steer: [v], coef: [1, 2, 1], layers: 0-1}\n", "s.yaml:11:", "twice" },
        { CHAIN " - {name: a, from: base, steer: [v], coef: [1,2,3,4,5,6,7,8,9,10], layers: 0-1}\n", "s.yaml:11:", "more than 9" },
        { CHAIN " - {name: a, from: base, steer: ['v:2@1,steps=first:3']}\n", "s.yaml:11:", "training steps" },
        { CHAIN " - {name: a, from: base, steer: [v], watch: {}}\n", "s.yaml:11:", "train" },
        { CHAIN " - name: a\n   train: {schedule: cosine}\n   watch: {}\n", "s.yaml:13:", "constant" },
        { CHAIN " - name: a\n   train: {}\n   watch: {above: 2}\n", "s.yaml:13:", "above" },
        { CHAIN " - name: a\n   train: {lr: -1}\n", "s.yaml:12:", "stages: a: train: lr" },
        { HEAD TAIL "stages: [{name: a, train: {steps: 1}, watch: {}}]\n", "s.yaml:5:", "eval: slots" },
        { HEAD "eval: {margin: p, projection: {directions: v}}\n", "s.yaml:4:", "eval: slots" },
        { HEAD TAIL "directions:\n - {name: d, rows: r, positive: p}\n", "s.yaml:6:", "negative" },
        { HEAD TAIL "directions:\n - {name: d/e, random_like: d}\n", "s.yaml:6:", "letters" },
        { HEAD TAIL "directions:\n - {name: d, random_like: e}\n", "s.yaml:6:", "no earlier direction" },
        { "name: ''\ntrain:\n  data: [{file: a}]\n" TAIL, "s.yaml:1:", "name" },
        { "name: &x n\ntrain:\n  data: [{file: *x}]\n" TAIL, "s.yaml:3:", "lias" },
        { "name: [n\n", "s.yaml:", "" },
        { "name: n\n\ttrain: 1\n", "s.yaml:", "tab" },
    };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct study_file *f;
        struct memory_log m;
        const keel_status st = parse(&f, cases[i].text, &m);
        if (st != KEEL_ERR_FORMAT || f || m.n != 1 || !strstr(m.last, cases[i].where) || !strstr(m.last, cases[i].what)) {
            fail_msg("case %zu: status %d, %d messages, last '%s', expected '%s' and '%s'", i, (int)st, m.n, m.last, cases[i].where,
                     cases[i].what);
        }
    }
}

static void test_binary(void **state)
{
    static const uint8_t zero[4] = { 'n', 0, ':', ' ' };
    struct study_file *f;
    struct memory_log m;
    (void)state;
    memory_log_init(&m);
    assert_int_equal(keel_study_parse(&f, zero, sizeof zero, "s.yaml", &m.log), KEEL_ERR_FORMAT);
    assert_logged(&m, "binary");
    keel_study_free(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults), cmocka_unit_test(test_values), cmocka_unit_test(test_mitigations),
        cmocka_unit_test(test_sweeps), cmocka_unit_test(test_stages),
        cmocka_unit_test(test_faults), cmocka_unit_test(test_binary),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
