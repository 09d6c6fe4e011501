#!/usr/bin/env bash
# ProntoQA as the paper uses it: data/prontoqa_train.json, data/prontoqa_valid.json, data/prontoqa_test.json
#
#     bash preprocessing/prontoqa.bash
#
# Clones the official generator (asaparov/prontoqa) at a pinned commit, installs numpy and scipy for it in a throwaway
# environment, runs the command of its users' README (about 40 minutes, one processor core), checks the result
# against preprocessing/checksums.txt and converts it with preprocessing/prontoqa.py. The generator's millions of
# warnings are normal; they go to data/prontoqa_generator.log, kept as .log.gz. What is in place already is left
# alone; a data/5hop_0shot_random.json that you copied there yourself is used instead of a run.
#
# COCONUT_PRONTOQA_REPO=ADDRESS     repository to clone, or the folder of a local clone
# COCONUT_PRONTOQA_PYTHON=PROGRAM   a Python that has numpy and scipy: nothing is installed then
# COCONUT_CHECKSUMS=FILE            other checksums and commit than preprocessing/checksums.txt
# PYTHON=PROGRAM                    Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$0" "$@"

RAW=5hop_0shot_random.json
LOG=$PWD/data/prontoqa_generator.log
REPO=${COCONUT_PRONTOQA_REPO:-https://github.com/asaparov/prontoqa}
[ ! -d "$REPO" ] || REPO=$(cd "$REPO" && pwd)
COMMIT=$(pin prontoqa commit)

# Only the pinned commit, where the server gives it (GitHub does); else every branch.
clone() {
  have git || die "git not found; install it, or run the generator elsewhere and copy $RAW into data/"
  say "cloning $REPO at $COMMIT"
  git init -q "$WORK/generator"
  run git -C "$WORK/generator" fetch -q --depth 1 "$REPO" "$COMMIT" 2>/dev/null ||
    run git -C "$WORK/generator" fetch -q "$REPO" '+refs/heads/*:refs/remotes/origin/*' 2>"$WORK/git.err" ||
    die "could not clone $REPO
  found:      $(tail -n 1 "$WORK/git.err")
  what to do: check the network and run again; or set COCONUT_PRONTOQA_REPO to a mirror or to a local clone"
  git -C "$WORK/generator" checkout -q "$COMMIT" 2>/dev/null || die "$REPO has no commit $COMMIT
  what to do: set COCONUT_PRONTOQA_REPO to a full clone of asaparov/prontoqa"
}

install() {
  GENERATOR_PYTHON=${COCONUT_PRONTOQA_PYTHON:-$WORK/venv/bin/python}
  if [ -z "${COCONUT_PRONTOQA_PYTHON:-}" ]; then
    say "installing numpy and scipy in a throwaway environment"
    run "$PYTHON" -m venv "$WORK/venv" >"$WORK/pip.err" 2>&1 && run "$WORK/venv/bin/python" -m pip install -q \
      --disable-pip-version-check numpy scipy >"$WORK/pip.err" 2>&1 || die "could not install numpy and scipy
  found:      $(grep -v '^$' "$WORK/pip.err" | tail -n 1)
  what to do: check the network (on Debian and Ubuntu also: apt install python3-venv) and run again; or set
              COCONUT_PRONTOQA_PYTHON to a Python that has both"
  fi
  "$GENERATOR_PYTHON" -c 'import numpy, scipy' 2>/dev/null ||
    die "$GENERATOR_PYTHON cannot import numpy and scipy; set COCONUT_PRONTOQA_PYTHON to a Python that has both, or unset it" 2
}

# The generator prints no count and writes its file at the end: this runs it unchanged and looks at its counter.
write_watcher() {
  cat >"$WORK/watch.py" <<'PYTHON'
import os
import runpy
import sys
import threading
import time

screen = os.fdopen(3, "w")
total = int(sys.argv[sys.argv.index("--num-trials") + 1])
pause = float(os.environ.get("COCONUT_PROGRESS_SECONDS") or (5 if screen.isatty() else 60))
started = time.monotonic()


def count():
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame and frame.f_code.co_name != "run_experiment":
        frame = frame.f_back
    return frame.f_locals.get("trial", 0) if frame else 0


def watch():
    while True:
        time.sleep(pause)
        done, minutes = count(), (time.monotonic() - started) / 60
        left = f", about {minutes / done * (total - done):.0f} left" if done else ""
        line = f"{done:,} of {total:,} examples after {minutes:.0f} minutes{left}"
        print(f"\r{line}   " if screen.isatty() else line, end="" if screen.isatty() else "\n", file=screen, flush=True)


threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
PYTHON
}

generate() {
  say "generating 10,000 examples: about 40 minutes. Its warnings are normal and go to $LOG"
  write_watcher
  UNFINISHED=$LOG
  (
    cd "$WORK/generator" &&
      exec "$GENERATOR_PYTHON" ../watch.py run_experiment.py --model-name json --model-size dummy --ordering random \
        --num-trials 10000 --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1
  ) 3>&2 >"$LOG" 2>&1 &
  CHILD=$!
  local status=0
  wait "$CHILD" || status=$?
  CHILD=
  [ ! -t 2 ] || printf '\n' >&2
  if [ "$status" -ne 0 ] || [ ! -s "$WORK/generator/$RAW" ]; then
    local last
    last=$(grep -v '^WARNING' "$LOG" | tail -n 3)
    UNFINISHED=
    mv "$LOG" "$LOG.failed"
    die "the generator stopped with status $status and without its $RAW
  found:      $last
  what to do: see $LOG.failed"
  fi
}

# A result that differs cost 40 minutes too: kept, under a name nothing reads.
accept() {
  check "$RAW" "$WORK/generator/$RAW" --advice "kept as data/$RAW.unexpected; to use it all the same, rename it to
              data/$RAW and run 'python preprocessing/prontoqa.py'" || {
    mv "$WORK/generator/$RAW" "data/$RAW.unexpected"
    exit 1
  }
  gzip -f "$LOG"
  UNFINISHED=data/.$RAW.part  # whole or absent, also where data/ is on another file system
  cp "$WORK/generator/$RAW" "$UNFINISHED" && mv "$UNFINISHED" "data/$RAW"
  UNFINISHED=
}

splits_in_place() {
  local missing=0 split
  for split in train valid test; do in_place "prontoqa_$split.json" || missing=1; done
  return "$missing"
}

if splits_in_place; then
  say "data/prontoqa_train.json, data/prontoqa_valid.json and data/prontoqa_test.json are in place"
  exit 0
fi
if ! in_place "$RAW"; then
  say "ProntoQA is generated, not downloaded: this takes about 40 minutes."
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/coconut-prontoqa.XXXXXX")
  SCRATCH=$WORK
  clone
  install
  generate
  accept
fi
run "$PYTHON" "$HERE/prontoqa.py" || exit $?
for split in train valid test; do
  check "prontoqa_$split.json" "data/prontoqa_$split.json" --advice "please report this"
done
