#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# test.sh: installs what is missing, builds, runs every test; the last line says how many passed and failed.
#   ./test.sh           unit tests and end-to-end tests on tiny models
#   ./test.sh --full    also the real 270M, sanitizers, fuzzers (60 s each), every Vulkan driver at hand (tests/drivers.py)
set -euo pipefail
cd "$(dirname "$0")"
. tests/setup.sh

full=0
case "${1:-}" in
"") ;;
--full) full=1 ;;
*) echo "usage: ./test.sh [--full]" >&2; exit 2 ;;
esac

passed=0 failed=0
count() { # count PASSED FAILED WHAT
    passed=$((passed + $1)) failed=$((failed + $2))
    say "$3: $1 passed, $2 failed"
}

# unit BUILD_FOLDER NAME [meson test options]: the unit tests of a build; counts what meson's log says.
unit() {
    local dir=$1 name=$2 log=$1/meson-logs/testlog.json ok bad
    shift 2
    rm -f "$log"
    meson test -C "$dir" --print-errorlogs "$@" || true
    ok=$(grep -c '"result": "\(OK\|EXPECTEDFAIL\)"' "$log" || true)
    bad=$(grep -c '"result": "\(FAIL\|ERROR\|TIMEOUT\|INTERRUPT\|UNEXPECTEDPASS\)"' "$log" || true)
    [ "$((ok + bad))" -gt 0 ] || bad=1 # no test at all is a failure
    count "$ok" "$bad" "$name"
}

# e2e NAME [pytest options]: the end-to-end tests.
e2e() {
    local name=$1 xml=build/e2e.xml counts
    shift
    rm -f "$xml"
    .venv/bin/pytest tests/e2e -q --junitxml="$xml" "$@" || true
    counts=$(python3 - "$xml" <<'PY'
import sys, xml.etree.ElementTree as tree
try:
    s = [t for t in tree.parse(sys.argv[1]).iter("testsuite")]
    n = lambda k: sum(int(t.get(k, 0)) for t in s)
    bad = n("failures") + n("errors")
    ok = n("tests") - bad - n("skipped")
    print(ok, bad if ok + bad else 1)
except (OSError, tree.ParseError):
    print(0, 1)
PY
)
    # shellcheck disable=SC2086
    count $counts "$name"
}

need_packages "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}"
build_keel build
need_python pytest numpy gguf torch==2.13.0 transformers peft safetensors sentencepiece pillow
unit build "unit tests"
if [ "$full" = 0 ]; then
    e2e "end-to-end tests"
else
    need_packages "${FULL_PACKAGES[@]}"
    KEEL_TEST_MODEL=$(fetch_model)
    export KEEL_TEST_MODEL
    e2e "end-to-end tests, all" --full

    build_keel build-asan -Db_sanitize=address,undefined -Db_lundef=false -Dbuildtype=debugoptimized
    # The driver keeps memory to the end of the process, so leaks are not looked for here.
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 unit build-asan "unit tests with sanitizers" --timeout-multiplier 5

    swiftshader=/usr/lib/chromium/vk_swiftshader_icd.json
    if [ -f "$swiftshader" ]; then
        VK_ICD_FILENAMES=$swiftshader unit build "unit tests on SwiftShader" --timeout-multiplier 3
        VK_ICD_FILENAMES=$swiftshader KEEL_TEST_TIMEOUT=600 e2e "scores and training on SwiftShader" -k "test_tiny or test_lora or test_perplexity or (test_losses and tiny_a)"
    fi
    need_packages "${CROSS_PACKAGES[@]}"
    arm64=()
    if { [ -f build-root-arm64/cross.ini ] || cross/sysroot arm64 build-root-arm64; } &&
        build_keel build-arm64 --cross-file build-root-arm64/cross.ini; then
        arm64=(--arm64 build-root-arm64 build-arm64)
        count 1 0 "build for arm64"
    else
        count 0 1 "build for arm64"
    fi
    matrix=$(python3 tests/drivers.py build "${arm64[@]}") || true
    echo "$matrix"
    # shellcheck disable=SC2046
    count $(tail -n 1 <<<"$matrix" | sed 's/\([0-9]*\) passed, \([0-9]*\) failed/\1 \2/') "kernels and the clerk on every driver"
    KEEL_TEST_ARGS="--caps min --validate" e2e "scores on the smallest device, validated" -k "test_tiny or test_lora or test_perplexity or (test_losses and tiny_a)"

    if ls tests/fuzz/fuzz_*.c >/dev/null 2>&1; then
        need_packages "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev" # clang only recommends its sanitizers
        CC=clang build_keel build-fuzz -Dfuzz=true -Db_sanitize=address,undefined -Db_lundef=false || count 0 1 "build of the fuzzers"
        for f in build-fuzz/tests/fuzz/fuzz_*; do
            [ -f "$f" ] && [ -x "$f" ] || continue
            name=$(basename "$f")
            mkdir -p "build-fuzz/corpus/$name"
            if "$f" -max_total_time=60 -rss_limit_mb=4096 "build-fuzz/corpus/$name" >"build-fuzz/$name.log" 2>&1; then
                count 1 0 "$name, 60 s"
            else
                tail -30 "build-fuzz/$name.log"
                count 0 1 "$name"
            fi
        done
    fi
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
