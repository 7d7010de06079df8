# Sourced by recipes: `facts COMMAND > run.txt` says what made a result.
facts() {
    echo "command   $*"
    echo "commit    $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' (and uncommitted changes)')"
    echo "hardware  $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc --all) cores"
    echo "seconds   $SECONDS"
    .venv/bin/python -c "import torch, transformers, platform
print('versions  python', platform.python_version(), 'torch', torch.__version__, 'transformers', transformers.__version__)
print('cpu       ', torch.backends.cpu.get_cpu_capability())"
}
