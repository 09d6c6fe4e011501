#!/usr/bin/env bash
# Download the paper's GSM8K: data/gsm_train.json, data/gsm_valid.json, data/gsm_test.json
#
#     bash preprocessing/gsm_icot.bash
#
# The text of Internalize-CoT (da03/Internalize_CoT_Step_by_Step, 88 MB) is downloaded at a pinned commit, verified
# against preprocessing/checksums.txt, converted by preprocessing/gsm_icot.py and then removed. Files in place are kept,
# so the script can be stopped and run again. A raw data/gsm_SPLIT.txt that you copied there replaces the download.
#
# COCONUT_GSM_URL=ADDRESS  folder with train.txt, valid.txt and test.txt (http://, https:// or file://)
# COCONUT_CHECKSUMS=FILE   replaces preprocessing/checksums.txt
# PYTHON=PROGRAM           Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$@"

convert() {
  local json=gsm_$1.json host=raw.githubusercontent.com
  # train.txt is in Git LFS: the raw host has only a pointer to it.
  [ "$1" != train ] || host=media.githubusercontent.com/media
  local folder=${COCONUT_GSM_URL:-https://$host/$REPOSITORY/data/gsm8k}
  in_place "gsm_$1.txt" || fetch "gsm_$1.txt" "${folder%/}/$1.txt" COCONUT_GSM_URL
  run "$PYTHON" "$HERE/gsm_icot.py" "$1" || exit
  datafiles check "$json" "data/$json" --advice "please report this; data/$json is removed" ||
    { rm -f "data/$json"; exit 1; }
}

REPOSITORY=da03/Internalize_CoT_Step_by_Step/$(datafiles pin gsm commit)
for split in train valid test; do
  in_place "gsm_$split.json" || convert "$split"
  raw=gsm_$split.txt
  if datafiles check "$raw" "data/$raw" >/dev/null 2>&1; then rm -f "data/$raw"; fi
done
