#!/bin/sh
# A visit to a machine with a GPU, on which nothing of ours is installed, which reaches no package index, and which is there
# for 15 minutes and commands of ten. From the root of the tree:
#
# 1. Before, with an index at hand; the folder travels with the tree (4 MiB):
#        benchmarks/gpu/visit.sh wheels .whl
# 2. There, 8 minutes: checks, then SB3's PPO, the environments alone and the engine with 8 and 128 environments, then the
#    tests that need a GPU. What there is to keep comes into OUT, as it is found:
#        benchmarks/gpu/visit.sh measure .whl OUT COMMIT
# 3. There, MINUTES and one more each time: Breakout, for 10 million steps in as many commands as it takes. Each leaves the run
#    in OUT/pieces, which the next one, on another machine perhaps, takes as PIECES:
#        benchmarks/gpu/visit.sh breakout .whl OUT COMMIT MINUTES [PIECES]
#
# OUT/gpu.json, OUT/run/record.json and OUT/run/learning_curve.png belong under benchmarks/results/, whatever they say.
set -u
python=${PYTHON:-python3}
step=${1:?wheels, measure or breakout} wheels=${2:?folder of wheels}

if [ "$step" = wheels ]; then
    exec "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$wheels" -c constraints.txt \
        stable-baselines3 gymnasium farama-notifications ale-py
fi

out=${3:?folder for what is found} commit=${4:?commit of this tree}
if ls "$wheels"/*.whl > /dev/null 2>&1; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
mkdir -p "$out"

case $step in
    measure)
        nvidia-smi
        "$python" -m benchmarks.gpu --out "$out" --commit "$commit" --budget-seconds 400 --n-envs 8 128
        found=$?
        [ $found = 3 ] && exit 3
        timeout 75 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "not is_right" 2>&1 | tee "$out/test_cuda.txt"
        exit $found
        ;;
    breakout)
        minutes=${5:?minutes}
        exec "$python" -m benchmarks.breakout --device cuda --engine cudagraph --halves --commit "$commit" --minutes "$minutes" --eval-every 1e6 \
            --out "$out/run" --pack "$out/pieces" ${6:+--unpack "$6"}
        ;;
    *)
        echo "visit.sh: $step is none of wheels, measure, breakout" >&2
        exit 2
        ;;
esac
