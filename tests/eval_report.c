// SPDX-License-Identifier: MIT
// tests/eval_report.c: record files to metrics, CSV, budget and the page, in a folder under the build folder.
#include "formats_util.h"

#include "eval.h"
#include "platform.h"

#include <jansson.h>
#include <math.h>

#define DIR "eval_report.tmp"

static void put(const char *name, const char *text)
{
    struct keel_text t = { 0 };
    char path[256];
    snprintf(path, sizeof path, DIR "/%s", name);
    keel_text_addf(&t, "%s", text);
    assert_int_equal(keel_text_save(&t, path, NULL), KEEL_OK);
    keel_text_finish(&t);
}

static char *get(const char *name)
{
    struct keel_text t = { 0 };
    char path[256];
    snprintf(path, sizeof path, DIR "/%s", name);
    assert_int_equal(keel_text_add_file(&t, path, NULL), KEEL_OK);
    return t.data;
}

static void gone(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, DIR "/%s", name);
    remove(path);
}

// Four probes: two share a prompt; one flips, one comes back.
static int setup(void **state)
{
    (void)state;
    keel_make_dirs(DIR "/base", NULL);
    keel_make_dirs(DIR "/tuned", NULL);
    keel_make_dirs(DIR "/train", NULL);
    put("base/margin.jsonl", "{\"id\":\"a\",\"domain\":\"colour\",\"prompt\":\"p\",\"margin\":1.5}\n"
                             "{\"id\":\"b\",\"domain\":\"colour\",\"prompt\":\"p\",\"margin\":0.5}\n"
                             "{\"id\":\"c\",\"domain\":\"da<y\\\"s\",\"prompt\":\"q\",\"margin\":-1}\n"
                             "{\"id\":\"d\",\"domain\":\"da<y\\\"s\",\"prompt\":\"r\",\"margin\":2}\n");
    put("tuned/margin.jsonl", "{\"id\":\"d\",\"domain\":\"da<y\\\"s\",\"prompt\":\"r\",\"margin\":1}\n"
                              "{\"id\":\"c\",\"domain\":\"da<y\\\"s\",\"prompt\":\"q\",\"margin\":0.5}\n"
                              "{\"id\":\"b\",\"domain\":\"colour\",\"prompt\":\"p\",\"margin\":-2.5}\n"
                              "{\"id\":\"a\",\"domain\":\"colour\",\"prompt\":\"p\",\"margin\":0.5}\n");
    put("base/narrow.jsonl", "{\"id\":\"n1\",\"prompt\":\"x\",\"logprob\":-4,\"n_tokens\":1}\n"
                             "{\"id\":\"n2\",\"prompt\":\"y\",\"logprob\":-5,\"n_tokens\":3}\n");
    put("tuned/narrow.jsonl", "{\"id\":\"n1\",\"prompt\":\"x\",\"logprob\":-1,\"n_tokens\":1}\n"
                              "{\"id\":\"n2\",\"prompt\":\"y\",\"logprob\":-2,\"n_tokens\":3}\n");
    put("tuned/kl.jsonl", "{\"id\":\"k1\",\"prompt\":\"x\",\"domain\":\"e\",\"kl\":[0.5,0.25],\"kl_reverse\":[0.75,0.25]}\n"
                          "{\"id\":\"k2\",\"prompt\":\"y\",\"domain\":\"e\",\"kl\":[1.5],\"kl_reverse\":[1]}\n");
    put("base/answers.jsonl", "{\"id\":\"k1\",\"prompt\":\"<script>\",\"text\":\"a & b\"}\n");
    put("tuned/answers.jsonl", "{\"id\":\"k1\",\"prompt\":\"<script>\",\"text\":\"\\\"q\\\"\"}\n");
    put("train/log.jsonl", "{\"step\":1,\"loss\":3,\"lr\":0.1,\"grad_norm\":1}\n{\"step\":2,\"loss\":2,\"lr\":0.1,\"grad_norm\":1}\n");
    put("manifest.json", "{\"format\":1,\"name\":\"t & u\",\"seed\":3,\"narrow_domain\":\"colour\","
                         "\"budget\":{\"kl_mean\":2,\"margin_drop\":0,\"flip_rate\":null}}");
    return 0;
}

static const struct keel_drift_params params = { .dir = DIR, .narrow_domain = "colour", .seed = 3 };

static void test_metrics(void **state)
{
    struct keel_drift d;
    const struct keel_drift_row *r;
    (void)state;
    assert_int_equal(keel_drift_compute(&d, &params, NULL), KEEL_OK);
    r = keel_drift_find(&d, KEEL_METRIC_MARGIN, "all");
    assert_true(r && r->n == 4 && r->n_clusters == 3 && r->base.value == 0.75 && r->adapted.value == -0.125);
    assert_true(r->change.value == -0.875 && r->change.lo <= -0.875 && r->change.hi >= -0.875);
    r = keel_drift_find(&d, KEEL_METRIC_MARGIN, "other");
    assert_true(r && r->n == 2 && r->n_clusters == 2 && r->change.value == 0.25);
    r = keel_drift_find(&d, KEEL_METRIC_MARGIN, "colour");
    assert_true(r && r->n == 2 && r->n_clusters == 1 && r->change.value == -2 && isnan(r->change.lo));
    r = keel_drift_find(&d, KEEL_METRIC_FLIP, "all");
    assert_true(r && r->base.value == 0.25 && r->adapted.value == 0.25 && r->broken == 1 && r->mended == 1);
    assert_true(fabs(r->base.hi - keel_wilson(1, 4).hi) < 1e-12 && r->change.value == 0);
    r = keel_drift_find(&d, KEEL_METRIC_NARROW_LOSS, "all"); // by token: 9 / 4 before, 3 / 4 after
    assert_true(r && r->base.value == 2.25 && r->adapted.value == 0.75 && r->change.value == -1.5);
    r = keel_drift_find(&d, KEEL_METRIC_KL, "all"); // mean over items of the mean over positions
    assert_true(r && r->adapted.value == (0.375 + 1.5) / 2 && isnan(r->base.value));
    r = keel_drift_find(&d, KEEL_METRIC_KL_REVERSE, "all");
    assert_true(r && r->adapted.value == 0.75);
    assert_null(keel_drift_find(&d, KEEL_METRIC_KL, "other")); // no item of the narrow domain: it would repeat "all"
    size_t at = 0;
    for (size_t i = 0; i < d.n; i++) {
        if (d.row[i].metric == KEEL_METRIC_KL_AT) {
            at++;
            assert_true(d.row[i].position == at && d.row[i].n == 3 - at && d.row[i].adapted.value == (at == 1 ? 1.0 : 0.25));
        }
    }
    assert_int_equal(at, 2);
    keel_drift_finish(&d);
}

#define SLOT(id, domain, modality, twin, a, c)                                                                                     \
    "{\"id\":\"" id "\",\"domain\":\"" domain "\",\"modality\":\"" modality "\",\"twin\":\"" twin "\",\"prompt\":\"" id           \
    "\",\"cluster\":\"" twin "\",\"p_aligned\":" #a ",\"p_contrary\":" #c "}\n"

// Two scenes asked in both modalities in the trained domain and another one, and a fact; two runs.
static int setup_slots(void **state)
{
    (void)state;
    keel_make_dirs(DIR "/base", NULL);
    keel_make_dirs(DIR "/runs/a/tuned", NULL);
    keel_make_dirs(DIR "/runs/b/tuned", NULL);
    gone("runs/a/tuned/.done");
    gone("runs/b/tuned/.done");
    static const char base[] = SLOT("n1", "colour", "image", "t1", 1, 0) SLOT("n2", "colour", "text", "t1", 1, 0)
        SLOT("i1", "shape", "image", "s1", 1, 0) SLOT("x1", "shape", "text", "s1", 1, 0) SLOT("i2", "shape", "image", "s2", 0.75, 0.25)
            SLOT("x2", "shape", "text", "s2", 1, 0) SLOT("f1", "capital", "fact", "", 0.5, 0);
    put("base/slots.jsonl", base);
    put("runs/a/tuned/slots.jsonl",
        SLOT("n1", "colour", "image", "t1", 0, 1) SLOT("n2", "colour", "text", "t1", 0.5, 0.5) SLOT("i1", "shape", "image", "s1", 0.5, 0.5)
            SLOT("x1", "shape", "text", "s1", 0.75, 0.25) SLOT("i2", "shape", "image", "s2", 0.25, 0.5)
                SLOT("x2", "shape", "text", "s2", 0.75, 0) SLOT("f1", "capital", "fact", "", 0.5, 0.5));
    put("runs/b/tuned/slots.jsonl", base);
    return 0;
}

static void test_slots(void **state)
{
    static const char *const runs[] = { DIR "/runs/a", DIR "/runs/b" };
    struct keel_drift d;
    const struct keel_drift_row *r;
    (void)state;
    struct keel_drift_params p = { .base = DIR "/base", .runs = runs, .n_runs = 1, .narrow_domain = "colour", .seed = 3 };
    assert_int_equal(keel_drift_compute(&d, &p, NULL), KEEL_OK);
    r = keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "colour", "image");
    assert_true(r && r->n == 1 && r->base.value == 0 && r->adapted.value == 1 && isnan(r->change.lo));
    r = keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "twins", "image"); // the trained domain is none of them
    assert_true(r && r->n == 2 && r->base.value == 0.125 && r->adapted.value == 0.5 && r->change.value == 0.375);
    r = keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "other", "");
    assert_true(r && r->n == 5 && r->n_clusters == 3 && r->adapted.value == 0.35);
    r = keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "capital", "fact"); // one of three modalities, none of the twins
    assert_true(r && r->n == 1 && r->adapted.value == 0.5 && !keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "twins", "fact"));
    r = keel_drift_cell(&d, KEEL_METRIC_COHERENCE, "shape", "text");
    assert_true(r && r->base.value == 1 && r->adapted.value == 0.875);
    r = keel_drift_find(&d, KEEL_METRIC_GAP, "shape"); // before (0 + 0.25) / 2; after (0.25 + 0.5) / 2
    assert_true(r && r->n == 2 && r->base.value == 0.125 && r->adapted.value == 0.375 && r->change.value == 0.25);
    assert_true(keel_drift_find(&d, KEEL_METRIC_GAP, "all")->n == 3 && keel_drift_find(&d, KEEL_METRIC_GAP, "other")->n == 2);
    keel_drift_finish(&d);
    // In context two of the probes were asked: the plain number beside it is of those two.
    put("base/slots_incontext.jsonl", SLOT("x2", "shape", "text", "s2", 1, 0) SLOT("i1", "shape", "image", "s1", 1, 0));
    put("runs/a/tuned/slots_incontext.jsonl", SLOT("x2", "shape", "text", "s2", 0.5, 0.5) SLOT("i1", "shape", "image", "s1", 0, 1));
    assert_int_equal(keel_drift_compute(&d, &p, NULL), KEEL_OK);
    r = keel_drift_find(&d, KEEL_METRIC_CONTEXT_CONTRARY, "all");
    assert_true(r && r->n == 2 && r->base.value == 0 && r->adapted.value == 0.75);
    r = keel_drift_find(&d, KEEL_METRIC_CONTEXT_PLAIN, "all"); // x2 0, i1 0.5
    assert_true(r && r->n == 2 && r->n_clusters == 2 && r->base.value == 0 && r->adapted.value == 0.25);
    r = keel_drift_cell(&d, KEEL_METRIC_CONTEXT_PLAIN, "shape", "image");
    assert_true(r && r->n == 1 && r->adapted.value == 0.5);
    keel_drift_finish(&d);
    gone("base/slots_incontext.jsonl");
    gone("runs/a/tuned/slots_incontext.jsonl");
    p.n_runs = 2; // the second run changed nothing: half of every change
    assert_int_equal(keel_drift_compute(&d, &p, NULL), KEEL_OK);
    r = keel_drift_cell(&d, KEEL_METRIC_CONTRARY, "twins", "image");
    assert_true(r && r->n_runs == 2 && r->run[0] == 0.5 && r->run[1] == 0.125 && r->change.value == 0.1875);
    assert_true(r->change.lo == 0); // both draws of the run may be the second
    keel_drift_finish(&d);
}

static void test_sweep_page(void **state)
{
    bool over;
    struct memory_log m;
    (void)state;
    put("manifest.json", "{\"name\":\"s\",\"seed\":3,\"narrow_domain\":\"colour\",\"narrow_modality\":\"image\",\"runs\":["
                         "{\"rank\":16,\"mixture\":1.0,\"seed\":1,\"folder\":\"runs/a\"},"
                         "{\"rank\":4,\"mixture\":1.0,\"seed\":1,\"folder\":\"runs/b\"},"
                         "{\"rank\":64,\"mixture\":1.0,\"seed\":1,\"folder\":\"runs/c\"}]}");
    put("base/examples.jsonl", "{\"id\":\"i1\",\"prompt\":\"q\",\"text\":\"it is so\",\"images\":[\"images/a.png\",\"gone.png\"]}\n");
    put("runs/a/tuned/examples.jsonl", "{\"id\":\"i1\",\"prompt\":\"q\",\"text\":\"it is not\",\"images\":[\"images/a.png\",\"gone.png\"]}\n");
    keel_make_dirs(DIR "/base/images", NULL);
    put("base/images/a.png", "\x89PNG\r\n\x1a\n..");
    memory_log_init(&m);
    assert_int_equal(keel_report_write(DIR, &over, &m.log), KEEL_ERR_DATA); // nothing has finished
    assert_logged(&m, "no run");
    put("runs/a/tuned/.done", "");
    put("runs/b/tuned/.done", "");
    assert_int_equal(keel_report_write(DIR, &over, NULL), KEEL_OK);
    char *html = get("report.html"), *csv = get("summary.csv"), *runs = get("runs.csv"), *plot = get("plots/drift_rank.csv");
    assert_non_null(strstr(html, "1 runs of the sweep are not finished"));
    assert_non_null(strstr(html, "src='data:image/png;base64,iVBORw0KGgouLg=='"));
    assert_non_null(strstr(html, ">gone.png<"));
    assert_non_null(strstr(html, "it is not"));
    assert_non_null(strstr(csv, "16,1,1,contrary,probability,\"twins\",\"image\",0,2,2,0.125,"));
    assert_non_null(strstr(runs, "4,1,1,contrary,probability,\"twins\",\"image\",0,2,2,0.125,,,0.125,,,0,,\n"));
    assert_non_null(strstr(plot, "\n4,0.125,")); // sorted by rank
    assert_true(strstr(plot, "\n16,0.5,") > strstr(plot, "\n4,0.125,"));
    free(html);
    free(csv);
    free(runs);
    free(plot);
    put("manifest.json", "{\"runs\":[{\"rank\":4,\"folder\":\"../x\"}]}");
    memory_log_init(&m);
    assert_int_equal(keel_report_write(DIR, &over, &m.log), KEEL_ERR_FORMAT);
    assert_logged(&m, "folder");
    gone("manifest.json");
}

static void test_bad_slots(void **state)
{
    static const struct keel_drift_params p = { .dir = DIR, .seed = 3 };
    static const char *const bad[] = { "{\"id\":\"a\",\"prompt\":\"p\",\"p_aligned\":0.5}\n",
                                       "{\"id\":\"a\",\"prompt\":\"p\",\"p_aligned\":0.75,\"p_contrary\":0.5}\n",
                                       "{\"id\":\"a\",\"prompt\":\"p\",\"p_aligned\":-0.5,\"p_contrary\":0.5}\n" };
    struct memory_log m;
    struct keel_drift d;
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        put("base/slots.jsonl", bad[i]);
        put("tuned/slots.jsonl", bad[i]);
        memory_log_init(&m);
        assert_int_equal(keel_drift_compute(&d, &p, &m.log), KEEL_ERR_DATA);
        assert_logged(&m, "slots.jsonl:1:");
    }
    gone("base/slots.jsonl");
    gone("tuned/slots.jsonl");
}

static void test_budget(void **state)
{
    struct keel_drift d;
    struct keel_budget_row row[3];
    (void)state;
    assert_int_equal(keel_drift_compute(&d, &params, NULL), KEEL_OK);
    assert_int_equal(keel_budget_check(&(struct keel_budget){ NAN, NAN, NAN }, &d, row), 0);
    assert_int_equal(keel_budget_check(&(struct keel_budget){ 0.5, 0, 0.5 }, &d, row), 3);
    assert_true(row[0].over && row[0].value == 0.9375);  // KL above 0.5
    assert_true(!row[1].over && row[1].value == -0.25);  // the margin of the other domains rose: a limit of 0 holds
    assert_true(!row[2].over && row[2].value == 0);
    keel_drift_finish(&d);
    assert_int_equal(keel_budget_check(&(struct keel_budget){ 0.5, NAN, NAN }, &d, row), 1);
    assert_true(row[0].over); // what was not measured has not held
}

static void test_page(void **state)
{
    bool over = true;
    (void)state;
    assert_int_equal(keel_report_write(DIR, &over, NULL), KEEL_OK);
    assert_false(over);
    char *html = get("report.html"), *csv = get("summary.csv"), *json = get("drift.json");
    assert_non_null(strstr(html, "t &amp; u"));
    assert_non_null(strstr(html, "&lt;script&gt;"));
    assert_null(strstr(html, "<script"));
    assert_null(strstr(html, "href=\"http"));
    assert_null(strstr(html, "src="));
    assert_non_null(strstr(html, "da&lt;y&quot;s"));
    assert_non_null(strstr(csv, "\"da<y\"\"s\"")); // RFC 4180
    json_t *rows = json_loads(json, 0, NULL);
    assert_non_null(rows);
    json_decref(rows);
    assert_true(keel_path_exists(DIR "/plots/margin.csv") && keel_path_exists(DIR "/plots/loss.csv"));
    assert_int_equal(keel_report_write(DIR, &over, NULL), KEEL_OK);
    char *again = get("report.html");
    assert_string_equal(html, again); // the page is a function of the records
    free(html);
    free(again);
    free(csv);
    free(json);
    put("manifest.json", "{\"seed\":3,\"budget\":{\"kl_mean\":0.9}}");
    assert_int_equal(keel_report_write(DIR, &over, NULL), KEEL_OK);
    assert_true(over);
    gone("manifest.json");
    assert_int_equal(keel_report_write(DIR, &over, NULL), KEEL_OK);
    assert_false(over);
}

static void test_bad_records(void **state)
{
    static const struct {
        const char *text, *message;
        keel_status st;
    } cases[] = {
        { "{\"id\":\"k1\",\"prompt\":\"x\"}\n", ":1:", KEEL_ERR_DATA },
        { "{\"id\":\"k1\",\"prompt\":\"x\",\"kl\":[]}\n", "empty", KEEL_ERR_DATA },
        { "{\"id\":\"k1\",\"prompt\":\"x\",\"kl\":[1,\"2\"]}\n", "element 1", KEEL_ERR_DATA },
        { "{\"id\":\"k1\",\"prompt\":\"x\",\"kl\":[1],\"kl_reverse\":[]}\n", "differ in length", KEEL_ERR_DATA },
        { "{\"id\":\"k1\",\"prompt\":\"x\",\"kl\":[1]}\n{\"id\":\"k1\",\"prompt\":\"x\",\"kl\":[1]}\n", ":2:", KEEL_ERR_DATA },
        { "\n\n", "no record", KEEL_ERR_DATA },
        { "{\"id\":\"k1\",", ":1:", KEEL_ERR_DATA },
    };
    struct memory_log m;
    struct keel_drift d;
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        memory_log_init(&m);
        put("tuned/kl.jsonl", cases[i].text);
        assert_int_equal(keel_drift_compute(&d, &params, &m.log), cases[i].st);
        assert_logged(&m, cases[i].message);
        assert_true(d.row == NULL && d.n == 0);
    }
    gone("tuned/kl.jsonl");
    memory_log_init(&m);
    put("tuned/margin.jsonl", "{\"id\":\"a\",\"domain\":\"colour\",\"prompt\":\"p\",\"margin\":1.5}\n");
    assert_int_equal(keel_drift_compute(&d, &params, &m.log), KEEL_ERR_MISMATCH);
    assert_logged(&m, "margin.jsonl");
    gone("tuned/margin.jsonl");
    memory_log_init(&m);
    put("tuned/narrow.jsonl", "{\"id\":\"n1\",\"prompt\":\"x\",\"logprob\":-1,\"n_tokens\":0}\n");
    assert_int_equal(keel_drift_compute(&d, &params, &m.log), KEEL_ERR_DATA);
    assert_logged(&m, "n_tokens");
    gone("tuned/narrow.jsonl");
    memory_log_init(&m);
    assert_int_equal(keel_drift_compute(&d, &params, &m.log), KEEL_ERR_DATA);
    assert_logged(&m, "no records");
    memory_log_init(&m);
    assert_int_equal(keel_report_write("eval_report.tmp/none", NULL, &m.log), KEEL_ERR_IO);
    assert_logged(&m, "no such folder");
    memory_log_init(&m);
    put("manifest.json", "[1");
    assert_int_equal(keel_report_write(DIR, NULL, &m.log), KEEL_ERR_FORMAT);
    assert_logged(&m, "manifest.json:1");
}

static void test_escape(void **state)
{
    struct keel_text t = { 0 };
    (void)state;
    keel_html_escape(&t, "<a href='x'>\"&\"\x01\xff\xc3\xa9</a>");
    assert_string_equal(t.data, "&lt;a href=&#39;x&#39;&gt;&quot;&amp;&quot; \xef\xbf\xbd\xc3\xa9&lt;/a&gt;");
    keel_text_finish(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_metrics, setup), cmocka_unit_test_setup(test_budget, setup),
        cmocka_unit_test_setup(test_page, setup),    cmocka_unit_test_setup(test_bad_records, setup),
        cmocka_unit_test(test_escape),
        cmocka_unit_test_setup(test_slots, setup_slots), cmocka_unit_test_setup(test_sweep_page, setup_slots),
        cmocka_unit_test_setup(test_bad_slots, setup),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
