#!/usr/bin/env bash
# The official ProsQA: data/prosqa_train.json, data/prosqa_valid.json, data/prosqa_test.json
#
#     bash preprocessing/prosqa.bash
#
# Downloads the three files (32 MB) from facebookresearch/coconut at a pinned commit and checks them against
# preprocessing/checksums.txt. For train the id that git gives its content decides: its sha256 is known at second hand
# only, so a difference in that alone is told and the file kept. What is in place already is left alone.
# To generate such problems instead, see preprocessing/prosqa.py.
#
# COCONUT_PROSQA_URL=ADDRESS  folder to take the three files from (http://, https:// or file://)
# COCONUT_CHECKSUMS=FILE      other checksums than preprocessing/checksums.txt
# PYTHON=PROGRAM              Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$0" "$@"

COMMIT=$(pin prosqa commit)
FOLDER=${COCONUT_PROSQA_URL:-https://raw.githubusercontent.com/facebookresearch/coconut/$COMMIT/data}
for split in train valid test; do
  if in_place "prosqa_$split.json"; then
    say "data/prosqa_$split.json is in place"
  else
    fetch "prosqa_$split.json" "${FOLDER%/}/prosqa_$split.json" COCONUT_PROSQA_URL
    say "data/prosqa_$split.json: downloaded and checked"
  fi
done
