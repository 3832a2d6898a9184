# shellcheck shell=bash
# The environment of a job, made by its batch script and by `sluice submit` before it, when it checks the configuration
# in that same environment. All values are variables that `sluice submit` has set; none is part of any shell text.
#
#   SLUICE_HOME     holds slurm/: the checkout, or a folder of the installed package
#   SLUICE_MODULES  modules to load, separated by spaces; may be empty
#   SLUICE_SETUP    a shell file of the cluster's profile to read; may be empty

if [[ -n ${SLUICE_MODULES:-} ]]; then
  if ! type module >/dev/null 2>&1; then
    # shellcheck source=/dev/null
    source /etc/profile
  fi
  read -r -a modules <<<"$SLUICE_MODULES"
  module load "${modules[@]}"
fi
if [[ -n ${SLUICE_SETUP:-} ]]; then
  # shellcheck source=/dev/null
  source "$SLUICE_SETUP"
fi
if [[ -d ${SLUICE_HOME:?}/launch ]]; then  # an installed package is found without
  export PYTHONPATH="$SLUICE_HOME${PYTHONPATH:+:$PYTHONPATH}"
fi
