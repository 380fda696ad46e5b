#!/bin/bash
# Curate a pool in slices over a Slurm cluster: measure (array), select, build (array), merge, each after the last.
#   jobs/slurm/submit.sh 64 --config R --pool POOL --out OUT
# POOL and OUT lie on a disk that all nodes share. The last job's id is printed; OUT/manifest.json says complete.
# sbatch options (partition, account, time) go into SBATCH_* variables, as Slurm reads them.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 SLICES --config R --pool POOL --out OUT ..." >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
slices=$1
shift
chained=(sbatch --parsable --kill-on-invalid-dep=yes)
measure=$(sbatch --parsable --array="1-$slices" "$here/curate_slice.sbatch" measure "$@")
select=$("${chained[@]}" --dependency="afterok:$measure" "$here/curate_whole.sbatch" select "$@")
build=$("${chained[@]}" --dependency="afterok:$select" --array="1-$slices" "$here/curate_slice.sbatch" build "$@")
"${chained[@]}" --dependency="afterok:$build" "$here/curate_whole.sbatch" all "$@"
