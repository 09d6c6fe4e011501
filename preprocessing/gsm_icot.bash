#!/usr/bin/env bash
# GSM8K as the paper uses it: data/gsm_train.json, data/gsm_valid.json, data/gsm_test.json
#
#     bash preprocessing/gsm_icot.bash
#
# Downloads the text of Internalize-CoT (da03/Internalize_CoT_Step_by_Step, 88 MB) at a pinned commit, checks it
# against preprocessing/checksums.txt, converts it with preprocessing/gsm_icot.py and removes it. What is in place
# already is left alone, so it can be interrupted and run again. A raw data/gsm_SPLIT.txt that you copied there
# yourself is used instead of a download.
#
# COCONUT_GSM_URL=ADDRESS  folder to take train.txt, valid.txt and test.txt from (http://, https:// or file://)
# COCONUT_CHECKSUMS=FILE   other checksums than preprocessing/checksums.txt
# PYTHON=PROGRAM           Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$0" "$@"

# The train file is kept in Git LFS: this host serves its content, the other one would give the pointer to it.
address() {
  local path=da03/Internalize_CoT_Step_by_Step/$COMMIT/data/gsm8k
  if [ -n "${COCONUT_GSM_URL:-}" ]; then
    say "${COCONUT_GSM_URL%/}/$1.txt"
  elif [ "$1" = train ]; then
    say "https://media.githubusercontent.com/media/$path/$1.txt"
  else
    say "https://raw.githubusercontent.com/$path/$1.txt"
  fi
}

# The raw text is removed once its conversion is in place, if it is the known one.
remove_raw() {
  if [ -e "data/gsm_$1.txt" ] && check "gsm_$1.txt" "data/gsm_$1.txt" 2>/dev/null; then rm -f "data/gsm_$1.txt"; fi
}

convert() {
  run "$PYTHON" "$HERE/gsm_icot.py" "$1" || exit $?
  check "gsm_$1.json" "data/gsm_$1.json" --advice "please report this; data/gsm_$1.json was removed" || {
    rm -f "data/gsm_$1.json"
    exit 1
  }
}

COMMIT=$(pin gsm commit)
for split in train valid test; do
  if in_place "gsm_$split.json"; then
    say "data/gsm_$split.json is in place"
  else
    in_place "gsm_$split.txt" || fetch "gsm_$split.txt" "$(address "$split")" COCONUT_GSM_URL
    convert "$split"
  fi
  remove_raw "$split"
done
