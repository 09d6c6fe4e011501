#!/usr/bin/env bash
# Download the official ProsQA: data/prosqa_train.json, data/prosqa_valid.json, data/prosqa_test.json
#
#     bash preprocessing/prosqa.bash
#
# The three files (32 MB) come from facebookresearch/coconut at a pinned commit and are verified against
# preprocessing/checksums.txt. For train, git's id of the content decides; its sha256 is known at second hand only, so
# the script prints a note if that differs. Files in place are kept. preprocessing/prosqa.py generates similar problems.
#
# COCONUT_PROSQA_URL=ADDRESS  folder with the three files (http://, https:// or file://)
# COCONUT_CHECKSUMS=FILE      replaces preprocessing/checksums.txt
# PYTHON=PROGRAM              Python to use (default: python3)

set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/fetch.sh"
start "$@"

COMMIT=$(datafiles pin prosqa commit)
FOLDER=${COCONUT_PROSQA_URL:-https://raw.githubusercontent.com/facebookresearch/coconut/$COMMIT/data}
for name in prosqa_train.json prosqa_valid.json prosqa_test.json; do
  in_place "$name" || fetch "$name" "${FOLDER%/}/$name" COCONUT_PROSQA_URL
done
