#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# demo.sh: a drift study on the real Gemma 3 270M, from nothing to a report: installs what is missing, builds, fetches the
# model, evaluates it, fine-tunes an adapter on facts that are wrong but harmless, evaluates again, writes one HTML page.
set -euo pipefail
cd "$(dirname "$0")"
. tests/setup.sh

need_packages "${BUILD_PACKAGES[@]}"
build_keel build
model=$(fetch_model)
out=out/demo
say "studying $model; stop with Ctrl-C, run again to go on"
build/src/cli/keel study studies/shifted-facts/study.yaml -m "$model" --out "$out" "$@"
report=$out/report.html
[ -f "$report" ] || { echo "no report was written" >&2; exit 1; }
say "the report: $PWD/$report"
