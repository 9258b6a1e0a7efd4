#!/usr/bin/env bash
# The native tests under sanitizers: tools/sanitize.sh [address|undefined|thread|all] [pytest arguments]
#
# Builds llama.cpp and our sources with the sanitizer into build/sanitize-KIND and runs tests/native, its RPC servers
# too, and native/tests there. Fails where a test fails, or where build/sanitize-KIND/reports holds a finding in our
# sources or llama.cpp's; tools/sanitizers/*.supp list what is not ours, with reasons.
# Needs the README's test environment (.venv, or PYTHON=…), CMake, and GCC 12 or newer with its sanitizer libraries.
# Takes a quarter of an hour and more for each; JOBS limits the compilers.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly root=$PWD
readonly kind=${1:-all}
shift || true

case $kind in
    address | undefined | thread) ;;
    all)
        for each in address undefined thread; do
            tools/sanitize.sh "$each" "$@"
        done
        exit
        ;;
    *)
        echo "tools/sanitize.sh: '$kind' is not one of address, undefined, thread, all" >&2
        exit 2
        ;;
esac

readonly python=${PYTHON:-$root/.venv/bin/python}
readonly build=$root/build/sanitize-$kind
readonly reports=$build/reports

# --- build -----------------------------------------------------------------------------------------------------------

# ggml's own threads instead of OpenMP's, whose barriers the thread sanitizer does not see. Of the libraries, the tests
# need no libmtmd. Optimised a little: frames stay readable, and upstream's kernels finish.
readonly flags="-fsanitize=$kind -fno-omit-frame-pointer -O1 -D_GLIBCXX_ASSERTIONS"
cmake -S native -B "$build" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
    -DGGML_OPENMP=OFF -DLLAMA_BUILD_MTMD=OFF -DEDGE_CSP_TESTS=ON
cmake --build "$build" -j "${JOBS:-$(nproc)}" >"$build/build.log" 2>&1 || { tail -50 "$build/build.log"; exit 1; }
cmake --install "$build" --component python --prefix "$build/python" >/dev/null

# --- run -------------------------------------------------------------------------------------------------------------

# Python is not instrumented: it has to load the runtime of the sanitizer first.
case $kind in
    address) runtime=libasan.so ;;
    undefined) runtime=libubsan.so ;;
    thread) runtime=libtsan.so ;;
esac
runtime=$("${CC:-cc}" -print-file-name="$runtime")

rm -rf "$reports" && mkdir "$reports"
options=log_path=$reports/report:print_stacktrace=1
if [ "$kind" = undefined ]; then
    options+=:suppressions=$root/tools/sanitizers/undefined.supp
fi
export ASAN_OPTIONS=$options:detect_leaks=1:detect_stack_use_after_return=1:strict_init_order=1
# Python leaks objects when it ends, the tools that tests start as well: see below
export LSAN_OPTIONS=exitcode=0:suppressions=$root/tools/sanitizers/leak.supp
export UBSAN_OPTIONS=$options
export TSAN_OPTIONS=$options:exitcode=0:second_deadlock_stack=1
export OPENBLAS_NUM_THREADS=1 # numpy's threads are not instrumented: each of them looks like a race
export PYTHONPATH=$build/python:$root
export PYTHONMALLOC=malloc # none of Python's pools, in which an overflow goes unseen

run() { LD_PRELOAD=$runtime "$@"; }

loaded=$(run "$python" -c 'import llama_cpp; print(llama_cpp.__file__)')
[ "$loaded" = "$build/python/llama_cpp/__init__.py" ] || { echo "tools/sanitize.sh: loads $loaded" >&2; exit 1; }

status=0
ctest --test-dir "$build" --output-on-failure || status=1
# Two tests compare sums in another order: kernels that are hardly optimised round them beyond their tolerances. One
# counts the examples of the property tests: here they are a fifth.
left_out=()
for test in test_caches.py::test_the_same_cells_in_all_heads test_caches.py::test_a_saved_sequence_goes_on \
    test_sequences_property.py::test_enough_examples_of_everything; do
    left_out+=(--deselect "tests/native/$test")
done
HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-short} \
    run "$python" -m pytest -q -p no:cacheprovider tests/native "${left_out[@]}" "$@" || status=1

shopt -s nullglob
for report in "$reports"/report*; do
    findings=$(cat "$report")
    if grep -q LeakSanitizer "$report"; then # paragraphs: those allocated in our sources or llama.cpp's
        findings=$(awk -v RS= -v ORS='\n\n' '/ leak of / && /native\/src\/|\/llama\.cpp\//' "$report")
    fi
    if [ -n "$findings" ]; then
        printf '\n== %s\n%s\n' "$report" "$findings"
        status=1
    fi
done
if [ "$status" = 0 ]; then
    echo "sanitizer $kind: clean"
else
    echo "sanitizer $kind: findings or failed tests" >&2
fi
exit "$status"
