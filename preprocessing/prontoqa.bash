#!/usr/bin/env bash
# Generate the paper's ProntoQA: data/prontoqa_train.json, data/prontoqa_valid.json, data/prontoqa_test.json
#
#     bash preprocessing/prontoqa.bash
#
# Clones the official generator (asaparov/prontoqa) at a pinned commit, installs numpy and scipy in a temporary
# environment, runs the official command (about 40 minutes on one CPU core), verifies the result against
# preprocessing/checksums.txt and converts it with preprocessing/prontoqa.py. The generator's output, millions of normal
# warnings, goes to data/prontoqa_generator.log, afterwards .log.gz. Files in place are kept. A
# data/5hop_0shot_random.json that you copied there replaces the generation.
#
# COCONUT_PRONTOQA_REPO=ADDRESS    repository to clone, or the folder of a local clone
# COCONUT_PRONTOQA_PYTHON=PROGRAM  Python with numpy and scipy; nothing is installed then
# COCONUT_CHECKSUMS=FILE           replaces preprocessing/checksums.txt
# PYTHON=PROGRAM                   Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$@"

RAW=5hop_0shot_random.json
LOG=$PWD/data/prontoqa_generator.log
SPLITS='prontoqa_train.json prontoqa_valid.json prontoqa_test.json'

clone() {
  local repo=${COCONUT_PRONTOQA_REPO:-https://github.com/asaparov/prontoqa} commit
  commit=$(datafiles pin prontoqa commit)
  [ ! -d "$repo" ] || repo=$(cd "$repo" && pwd)
  have git || die "git not found; install it, or run the generator elsewhere and copy $RAW into data/"
  say "cloning $repo at $commit"
  git init -q "$GENERATOR"
  # GitHub serves a single commit; another server may serve branches only.
  run git -C "$GENERATOR" fetch -q --depth 1 "$repo" "$commit" 2>/dev/null ||
    run git -C "$GENERATOR" fetch -q "$repo" '+refs/heads/*:refs/remotes/origin/*' || die "could not clone $repo
  found:      the message above
  what to do: check the network and run again; or set COCONUT_PRONTOQA_REPO to a mirror or a local clone"
  git -C "$GENERATOR" checkout -q "$commit" 2>/dev/null || die "$repo has no commit $commit
  what to do: set COCONUT_PRONTOQA_REPO to a full clone of asaparov/prontoqa"
}

install() {
  say "installing numpy and scipy in a temporary environment"
  run "$PYTHON" -m venv "$SCRATCH/venv" >&2 &&
    run "$SCIPY_PYTHON" -m pip install -q --disable-pip-version-check numpy scipy >&2 ||
    die "could not install numpy and scipy
  found:      the message above
  what to do: check the network (on Debian and Ubuntu also: apt install python3-venv) and run again; or set
              COCONUT_PRONTOQA_PYTHON to a Python that has both"
}

# The generator prints no count and writes its file at the end, so the only progress to report is the time.
generate() {
  local status=0 seconds=0
  say "generating 10,000 examples; the generator's output goes to $LOG"
  UNFINISHED=$LOG
  # PYTHONSAFEPATH would keep the generator from importing its own files.
  (cd "$GENERATOR" && PYTHONSAFEPATH='' exec "$SCIPY_PYTHON" run_experiment.py --model-name json \
    --model-size dummy --ordering random --num-trials 10000 --few-shot-examples 0 --ontology fictional --min-hops 5 \
    --max-hops 5 --hops-skip 1) >"$LOG" 2>&1 &
  CHILD=$!
  while kill -0 "$CHILD" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    [ $((seconds % 60)) -ne 0 ] || say "$((seconds / 60)) min so far, about 40 min in all" >&2
  done
  wait "$CHILD" || status=$?
  CHILD=
  [ "$status" -ne 0 ] || [ ! -s "$GENERATOR/$RAW" ] || return 0
  UNFINISHED=
  mv "$LOG" "$LOG.failed"
  die "the generator stopped with status $status and without its $RAW
  found:      $(grep -v '^WARNING' "$LOG.failed" | tail -n 3)
  what to do: see $LOG.failed"
}

# A result that differs took 40 minutes too, so it is kept under a name that no script reads.
accept() {
  datafiles check "$RAW" "$GENERATOR/$RAW" --advice "kept as data/$RAW.unexpected; to use it nevertheless,
              rename it to data/$RAW and run 'python preprocessing/prontoqa.py'" ||
    { mv "$GENERATOR/$RAW" "data/$RAW.unexpected"; exit 1; }
  UNFINISHED=data/.$RAW.part  # the temporary folder may be on another file system, where mv would copy
  cp "$GENERATOR/$RAW" "$UNFINISHED"
  mv "$UNFINISHED" "data/$RAW"
  gzip -f "$LOG"
}

missing=
for name in $SPLITS; do in_place "$name" || missing=$name; done
[ -n "$missing" ] || exit 0
if ! in_place "$RAW"; then
  say "ProntoQA is generated, not downloaded: this takes about 40 minutes."
  SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/coconut-prontoqa.XXXXXX")
  GENERATOR=$SCRATCH/generator
  SCIPY_PYTHON=${COCONUT_PRONTOQA_PYTHON:-$SCRATCH/venv/bin/python}
  clone
  [ -n "${COCONUT_PRONTOQA_PYTHON:-}" ] || install
  "$SCIPY_PYTHON" -c 'import numpy, scipy' 2>/dev/null || die "$SCIPY_PYTHON cannot import numpy and scipy
  what to do: set COCONUT_PRONTOQA_PYTHON to a Python that has both, or unset it" 2
  generate
  accept
fi
run "$PYTHON" "$HERE/prontoqa.py"
for name in $SPLITS; do datafiles check "$name" "data/$name" --advice "please report this"; done
