#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# demo.sh: a drift study from nothing to a report: installs what is missing, builds, evaluates a model, fine-tunes adapters on answers
# that are wrong but harmless, evaluates again, writes one HTML page.
#   ./demo.sh            the clerk, a tiny vision-language model that comes with keel: three ranks and two mixtures, no download
#   ./demo.sh --gemma    the real Gemma 3 270M, fetched once: one adapter on shifted facts
# Further arguments go to keel study.
set -euo pipefail
cd "$(dirname "$0")"
. tests/setup.sh

study=studies/clerk/study.yaml
out=out/clerk
if [ "${1:-}" = --gemma ]; then
    study=studies/shifted-facts/study.yaml
    out=out/demo
    shift
fi
need_packages "${BUILD_PACKAGES[@]}"
BUILD_TARGET=src/cli/keel build_keel build # without the tests
model=()
if [ "$out" = out/demo ]; then
    file=$(fetch_model)
    model=(-m "$file")
fi
say "running $study; stop with Ctrl-C, run again to go on"
build/src/cli/keel study "$study" "${model[@]}" --out "$out" "$@"
report=$out/report.html
[ -f "$report" ] || { echo "no report was written" >&2; exit 1; }
say "the report: $PWD/$report"
