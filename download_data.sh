#!/usr/bin/env bash
# Download what the paper used.
#
#   bash download_data.sh                      MS MARCO: collection, dev topics and qrels, BM25 run   (needs 4.1 GB)
#   bash download_data.sh dl20                 TREC DL 2020: topics and qrels                         (under 1 MB)
#   bash download_data.sh prompts              the paper's own two prompts                            (3 KB)
#   bash download_data.sh synthetic NAME ...   published synthetic queries                            (100,000 each)
#
# NAME: msmarco robust04 nq trec_covid fiqa dbpedia scidocs scifacts arguana bioasq climate_fever cqadupstack fever
#       hotpotqa nfcorpus quora signal touche trec_news
#
# Files are written to data/. Existing files are skipped, interrupted downloads resume. Checksums are verified; where none
# is published, the first and the last line are checked.
set -euo pipefail

# Hosts. Set these variables to use mirrors.
MSMARCO_HOST=${MSMARCO_HOST:-https://msmarco.z22.web.core.windows.net}
GITHUB_HOST=${GITHUB_HOST:-https://raw.githubusercontent.com}
GOOGLE_HOST=${GOOGLE_HOST:-https://storage.googleapis.com}
INPARS_HOST=${INPARS_HOST:-https://zav-public.s3.amazonaws.com}
COLLECTION_MD5=${COLLECTION_MD5:-87dd01826da3e2ad45447ba5af577628} # of the archive; a mirror may have compressed the collection again

MSMARCO=data/msmarco
SYNTHETIC=$(sed -n '/^# NAME:/,/^#$/s/^# *\(NAME:\)\{0,1\}//p' "$0")

fail() {
    echo "error: $*" >&2
    exit 1
}

checksum() { # algorithm file
    case $1 in
        sha256) if command -v sha256sum >/dev/null; then sha256sum "$2"; else shasum -a 256 "$2"; fi ;;
        md5) if command -v md5sum >/dev/null; then md5sum "$2"; else md5 -r "$2"; fi ;;
    esac | cut -d ' ' -f 1
}

is_complete() { # file check [sum]: compare the checksum or, without a published one, look at the first and the last line
    local first last numbers=$'^[0-9]+\t[0-9]+\t[0-9]+$'
    [ -s "$1" ] || return 1
    first=$(head -n 1 "$1" | tr -d '\0')
    last=$(tail -n 1 "$1" | tr -d '\0')
    case $2 in
        jsonl) [[ $first == "{"* && $last == *"}" ]] ;;
        run) [[ $first =~ $numbers && $last =~ $numbers && -z $(tail -c 1 "$1") ]] ;; # it ends with a newline
        *) [ "$(checksum "$2" "$1")" = "$3" ] ;;
    esac
}

fetch() { # url file check [sum]
    local url=$1 file=$2 check=$3 sum=${4:-} part=$2.part etag=$2.part.etag status=0 code=
    if [ -e "$file" ]; then
        echo "$file exists: skipped"
        return
    fi
    mkdir -p "$(dirname "$file")"
    if [ -z "$sum" ] && ! [[ -e $part && -s $etag ]]; then
        rm -f "$part" # without a checksum, only the server's ETag tells whether the rest belongs to this part
    fi
    if [ -z "$sum" ] || ! is_complete "$part" "$check" "$sum"; then
        echo "$url -> $file"
        if [ -e "$part" ]; then
            resume "$url" "$part" || status=$?
        else
            status=33
        fi
        # The part is complete (416), is of another version of the file, or the server supports no ranges (curl 33).
        if [ "$code" = 416 ] || [ $status = 33 ]; then
            status=0
            rm -f "$part" "$etag"
            code=$(curl --fail --location --retry 5 --etag-save "$etag" --output "$part" --write-out '%{http_code}' "$url") ||
                status=$?
        fi
        [ "$code" != 404 ] || fail "$url: not found (404). The file may have moved: see the page of its data set."
        [ $status = 0 ] || fail "$url: download failed (curl $status, HTTP $code). Run the same command again to resume."
    fi
    if ! is_complete "$part" "$check" "$sum"; then
        rm -f "$part" "$etag"
        [ -z "$sum" ] || fail "$url: the file has changed, its $check is not $sum. Nothing was kept. Run the command again or set a mirror."
        fail "$url: the server sent a part of the file, an HTML page or nothing. Nothing was kept. Try again later or set a mirror."
    fi
    rm -f "$etag"
    mv "$part" "$file"
}

resume() { # url part: sets `code`
    local match=()
    [ ! -s "$2.etag" ] || match=(--header "If-Range: $(tr -d '\r\n' <"$2.etag")")
    code=$(curl --fail --location --retry 5 ${match[@]+"${match[@]}"} --continue-at - --output "$2" --write-out '%{http_code}' "$1")
}

anserini() { # path sha256
    fetch "$GITHUB_HOST/castorini/anserini-tools/master/$1" "$MSMARCO/$(basename "$1")" sha256 "$2"
}

msmarco() {
    echo "MS MARCO passages into $MSMARCO: 1.0 GB to download, 4.1 GB of disk while unpacking, 3.1 GB afterwards"
    anserini topics/topics.msmarco-passage.dev-subset.txt f4f71fa87b6be4fb968cca2b8f8554c4ebd003e6c3488af3ac1cc5629c3de189
    anserini qrels/qrels.msmarco-passage.dev-subset.txt 34ef51a24e049b3dd19b0a448b764f26b0def22ec42f421ecba2db91f82e7042
    # The run is optional: python -m inpars_lib.bm25 search makes one too.
    (fetch "$GOOGLE_HOST/duobert_git/run.bm25.dev.small.tsv" "$MSMARCO/run.bm25.dev.small.tsv" run) ||
        echo "warning: continuing without the optional BM25 run" >&2
    if [ -e "$MSMARCO/collection.tsv" ]; then
        echo "$MSMARCO/collection.tsv exists: skipped"
        return
    fi
    fetch "$MSMARCO_HOST/msmarcoranking/collection.tar.gz" "$MSMARCO/collection.tar.gz" md5 "$COLLECTION_MD5"
    echo "Unpacking $MSMARCO/collection.tsv"
    rm -rf "$MSMARCO/unpacking"
    mkdir "$MSMARCO/unpacking"
    tar -xf "$MSMARCO/collection.tar.gz" -C "$MSMARCO/unpacking"
    mv "$MSMARCO/unpacking/collection.tsv" "$MSMARCO/collection.tsv"
    rm -r "$MSMARCO/unpacking" "$MSMARCO/collection.tar.gz"
}

dl20() {
    echo "TREC DL 2020 into $MSMARCO: under 1 MB"
    anserini topics/topics.dl20.txt 726cb4018b85a335fcbe09004df7f084ec1bf20531961d9af7b0c71dd609e69b
    anserini qrels/qrels.dl20-passage.txt 60d4c34561f9687f8f73e0a752ba80ab80159b3e9c1bedd0a351f747ed6f5684
}

prompts() {
    echo "The paper's prompts into data/prompts: 3 KB"
    local prompts=$GITHUB_HOST/zetaalphavector/InPars/master/legacy/inpars-v1/prompts
    fetch "$prompts/vanilla_prompt.txt" data/prompts/vanilla_prompt.txt \
        sha256 46b3f06c8d1ebd352c7af795fe6e163f5e5ca11e65cf5c8f1cdde9e7569922be
    fetch "$prompts/gbq_prompt.txt" data/prompts/gbq_prompt.txt \
        sha256 e7a96bc798bd39fb881bfaf9b0cee904acfe353909a43f1562857c4ccddb3b799
}

synthetic() {
    [ $# -gt 0 ] || usage
    local name
    for name in "$@"; do
        case " $(echo $SYNTHETIC) " in
            *" $name "*) ;;
            *) usage ;;
        esac
    done
    echo "$# sets of 100,000 synthetic queries into data/synthetic; curl shows the size of each"
    for name in "$@"; do
        fetch "$INPARS_HOST/inpars/${name}_synthetic_queries_100k.jsonl" "data/synthetic/${name}_synthetic_queries_100k.jsonl" jsonl
    done
}

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

command -v curl >/dev/null || fail "curl is not installed. Install it, or download the addresses in $0 by hand."
case ${1:-msmarco} in
    msmarco | dl20 | prompts)
        [ $# -le 1 ] || usage
        "${1:-msmarco}"
        ;;
    synthetic) "$@" ;;
    *) usage ;;
esac
