"""Sets up `.venv` beside this file and runs the main example or the tests in it.

  python3 run.py example [options of examples/layer_cadence.py]
  python3 run.py test [--all] [options of pytest]

`test` leaves out what takes long, the examples and the benchmark's own runs, unless there is
`--all`. What it compiles is kept in the environment's folder, so that the next run is faster.

Needs Python 3.11 or newer with venv, and nothing else. What is installed already is used
again; `OPTAX_CADENCE_VENV` names another folder for the environment.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMANDS = {
  "example": ("examples", ["examples/layer_cadence.py"]),
  "test": ("test", ["-m", "pytest", "-n", "2"]),
}


def works(python):
  """Whether `python` is there with pip, and not the rest of an interrupted set-up."""
  command = [python, "-m", "pip", "--version"]
  return python.exists() and subprocess.run(command, capture_output=True).returncode == 0


def environment(folder, extra):
  """Returns the Python of an environment in which this package and `extra` are installed."""
  python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
  # Written last, so that an interrupted set-up is done again; its text says what was installed.
  stamp = folder / f"optax_cadence-{extra}.txt"
  wanted = f"{ROOT}\n{(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}"
  if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
    return python
  print(f"Setting up {folder} (once; a few minutes) ...", flush=True)
  if not works(python):
    # Of a folder that is no environment, nothing is removed.
    clear = ["--clear"] if (folder / "pyvenv.cfg").exists() else []
    subprocess.run([sys.executable, "-m", "venv", *clear, folder], check=True)
  subprocess.run(
    [python, "-m", "pip", "install", "-qq", "--editable", f"{ROOT}[{extra}]"], check=True
  )
  stamp.write_text(wanted, encoding="utf-8")
  return python


def compilation_cache(folder):
  """Returns the settings with which JAX keeps every program that it compiles in `folder`."""
  # Every change of the package leaves programs behind that nothing asks for any more.
  if folder.exists() and sum(file.stat().st_size for file in folder.iterdir()) > 2**30:
    shutil.rmtree(folder)
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def main():
  """Runs the command that was asked for and exits with its exit code."""
  if sys.version_info < (3, 11):  # noqa: UP036 (the caller's Python, not the package's)
    sys.exit("optax_cadence needs Python 3.11 or newer; this is Python " + sys.version.split()[0])
  if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit(__doc__)
  folder = Path(os.environ.get("OPTAX_CADENCE_VENV") or ROOT / ".venv").absolute()
  extra, command = COMMANDS[sys.argv[1]]
  options, settings = sys.argv[2:], dict(os.environ)
  if sys.argv[1] == "test":
    # No marker is asked for, in place of the choice in pyproject.toml.
    options = [part for x in options for part in (["-m", ""] if x == "--all" else [x])]
    settings = compilation_cache(folder / "compiled") | settings
  try:
    python = environment(folder, extra)
  except subprocess.CalledProcessError as error:
    sys.exit(f"Set-up failed: {' '.join(map(str, error.cmd))}")
  sys.exit(subprocess.run([python, *command, *options], cwd=ROOT, env=settings).returncode)


if __name__ == "__main__":
  main()
