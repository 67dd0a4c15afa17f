"""Builds `hf_longctx/_C.so` out of `csrc/`: plain C functions that link nothing of torch.

An isolated build cannot see the torch that the package will run with; so nothing of it is needed here, and one binary
serves every version of torch and of Python. Where no compiler is, the package installs without, and says why in
`hf_longctx/_C.txt`, which `hf-longctx doctor` shows.

    HF_LONGCTX_BUILD   auto (the default: what there is a compiler for), off, cpu or cuda (an error if that fails)
    HF_LONGCTX_ARCHS   CUDA architectures with semicolons between; 80+ptx adds code for GPUs to come
    MAX_JOBS           compilers at a time
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
OBJECTS = Path(__file__).parent / "build" / "objects"  # of all installs from here, editable ones too
MODES = ("auto", "off", "cpu", "cuda")
OLDEST = "cp310"  # requires-python in pyproject.toml
ARCHS = "80;86;89;90a;100;120;80+ptx"
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
NVCC_FLAGS = [
    *["-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings"],
    *("-Xptxas", "--warn-on-spills,--warn-on-local-memory-usage,-Werror"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Werror"),
]


class Unbuildable(Exception):
    """Why a library cannot be built here."""


def mode() -> str:
    """What was asked for."""
    asked = os.environ.get("HF_LONGCTX_BUILD") or "auto"
    if asked not in MODES:
        raise SystemExit(f"HF_LONGCTX_BUILD: expected one of {', '.join(MODES)}; got '{asked}'. Unset it.")
    return asked


def find(name: str, variable: str, *folders: str) -> str:
    """Path of a compiler: what a variable names, on the PATH, or in some folders."""
    wanted = os.environ.get(variable) or name
    for path in (None, *folders):
        found = shutil.which(wanted, path=path)
        if found:
            return found
    raise Unbuildable(f"there is no {wanted} on the PATH")


def nvcc() -> str:
    """The CUDA compiler."""
    return find(
        "nvcc", "NVCC", *(str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home)
    )


def code_flags(compiler: str) -> list[str]:
    """One `-gencode` for each architecture; of those that nobody asked for, the ones that the compiler knows."""
    asked = os.environ.get("HF_LONGCTX_ARCHS")
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    flags = []
    for arch in (asked or ARCHS).split(";"):
        number, _, ptx = arch.strip().partition("+")
        if asked or f"compute_{number.rstrip('af')}" in known:
            flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def run(command: list[str]) -> None:
    """Run a compiler; raises Unbuildable with what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unbuildable(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def compiled(command: list[str], source: Path) -> str:
    """The object of a source, made unless the same command has made it from the same files before."""
    files = sorted(file for file in CSRC.rglob("*") if file.suffix in (".h", ".cuh", ".inl"))
    digest = hashlib.sha256("\0".join(command).encode())
    for file in (source, *files):
        digest.update(file.read_bytes())
    made = OBJECTS / f"{source.stem}-{source.suffix[1:]}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        scratch = made.with_suffix(".part")
        run([*command, "-c", str(source), "-o", str(scratch)])
        scratch.replace(made)
    return str(made)


def build(library: Path, cuda: bool) -> None:
    """Compile and link; raises Unbuildable."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    cxx = find("g++", "CXX")
    about = f'-DHFL_BUILD="{"CUDA " if cuda else ""}%s"'
    archs = code_flags(nvcc()) if cuda else []
    named = about % ", ".join(flag.rpartition("code=")[2] for flag in archs) if cuda else about % "CPU only"
    jobs = [([cxx, *CXX_FLAGS], file) for file in sorted((CSRC / "cpu").glob("*.cpp"))]
    jobs.append(([cxx, *CXX_FLAGS, named, *(["-DHFL_CUDA"] if cuda else [])], CSRC / "abi.cpp"))
    if cuda:  # the longest first
        jobs = [([nvcc(), *NVCC_FLAGS, *archs], file) for file in sorted((CSRC / "cuda").glob("*.cu"))] + jobs
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        made = list(pool.map(lambda job: compiled(*job), jobs))
    linker = [cxx, "-shared", "-fopenmp", "-s", "-Wl,-z,defs"]
    if cuda:
        linker = [nvcc(), "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp", *("-Xlinker", "-s,-z,defs")]
    run([*linker, "-o", str(library), *made])


class Build(build_ext):
    """The compilers called directly; what comes out is `_C.so`, or `_C.txt` that says why not."""

    def get_ext_filename(self, name: str) -> str:
        """The same for every Python."""
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Try CUDA, then without, unless one was asked for."""
        asked = mode()
        library, said = Path(self.get_ext_fullpath(ext.name)), []
        library.parent.mkdir(parents=True, exist_ok=True)
        for file in (library, library.with_suffix(".txt")):
            file.unlink(missing_ok=True)
        for kind in {"auto": ("cuda", "cpu"), "off": ()}.get(asked, (asked,)):
            try:
                build(library, kind == "cuda")
            except Unbuildable as why:
                if asked == kind:
                    raise SystemExit(f"HF_LONGCTX_BUILD={asked}: {why}") from why
                said.append(f"no {kind.upper()} code: {why}")
            else:
                break
        if asked == "off":
            said = ["it was installed with HF_LONGCTX_BUILD=off"]
        if said:
            library.with_suffix(".txt").write_text("\n".join(said) + "\n")
            print("hf_longctx:", "; ".join(said), "PyTorch does that work.", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What there is of it."""
        return [name for path in super().get_outputs() for name in made_of(Path(path))]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing that an editable install would link: `copy_extensions_to_source` has put it there."""
        return {}

    def copy_extensions_to_source(self) -> None:
        """For an editable install, beside the package."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            beside = Path(self.get_finalized_command("build_py").get_package_dir("hf_longctx"))
            for suffix in (".so", ".txt"):
                (beside / f"_C{suffix}").unlink(missing_ok=True)
            for name in made_of(built):
                shutil.copy2(name, beside)


def made_of(library: Path) -> list[str]:
    """The files of a library that exist."""
    return [str(file) for file in (library, library.with_suffix(".txt")) if file.exists()]


class Wheel(bdist_wheel):
    """With a library: a wheel for one platform and every later Python; without: one for all of them."""

    def run(self) -> None:
        """Build first, for whether there is a library decides where files go and what the wheel is called."""
        self.run_command("build")
        library = Path(self.get_finalized_command("build_ext").get_ext_fullpath("hf_longctx._C"))
        self.root_is_pure = not library.exists()
        if self.root_is_pure:
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Nothing of Python is linked, so the oldest that the package runs on stands for all."""
        return ("py3", "none", "any") if self.root_is_pure else (OLDEST, "abi3", super().get_tag()[2])


files = [str(file.relative_to(CSRC.parent)) for file in CSRC.rglob("*") if file.is_file()]  # for the source package
setup(ext_modules=[Extension("hf_longctx._C", [], depends=files)], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
