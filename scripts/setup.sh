# Sourced by the other scripts: makes .venv in the checkout, or reuses it when nothing it depends on has changed.
# Installs $extras of pyproject.toml, by default all that the tests need. Sets $python. Works with Python 3.10 to 3.13;
# PYTHON=/path/to/python chooses one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.installed-for
extras=${extras:-rtx,dev}
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
installed=$([[ ! -f $stamp ]] || cat "$stamp")
python=.venv/bin/python

usable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

if [[ $installed != "$wanted $extras" && $installed != "$wanted rtx,dev" ]]; then
    base=""
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if usable "$candidate"; then base=$candidate; break; fi
    done
    if [[ -z $base ]]; then
        echo "error: no Python 3.10 to 3.13 found (tried ${PYTHON:-python3}, python3.13 ... python3.10); install one, or set PYTHON=/path/to/it" >&2
        exit 2
    fi
    echo "setting up .venv with $("$base" --version) (once; later runs reuse it)"
    if ! usable "$python"; then rm -rf .venv; "$base" -m venv .venv; fi
    "$python" -m pip install --quiet --disable-pip-version-check uv
    # uv takes matching builds of torch and torchvision, and installs in seconds. Without bytecode each process would take
    # 5 s longer to import them, where Python is told to write none.
    "$python" -m uv pip install --quiet --compile-bytecode --python "$python" -c constraints.txt -e ".[$extras]"
    if [[ $extras == *dev* ]]; then
        # TensorRT's types for the type checker, apart from the packages: the whole of TensorRT would come with them. Two
        # of their lines are no Python: a parameter called "in", and one without a default behind one that has it.
        "$python" -m uv pip install --quiet --python "$python" --no-deps --target .venv/stubs tensorrt-stubs==10.13.0.35.1
        sed -i -E 's/\bin: list/in_: list/; s/(power: Weights = None, channel_axis: int)\)/\1 = 0)/' \
            .venv/stubs/tensorrt_bindings/tensorrt.pyi
    fi
    echo "$wanted $extras" > "$stamp"
fi
