"""Debian's packages in a directory, with an apt of its own that neither reads nor changes the system's."""

import shutil
from pathlib import Path

from sherry_gguf.errors import Stop
from sherry_gguf.programs import call


def archive() -> str:
    """The address that this system's apt gets Debian's own packages from. Raises Stop if it has none."""
    rows = call("apt-get", "indextargets", "--format", "$(CREATED_BY) $(COMPONENT) $(RELEASE) $(REPO_URI)").splitlines()
    # A system names its release, and for that release's updates other names.
    for created_by, component, release, uri in (row.split() for row in rows if row.count(" ") == 3):
        if (created_by, component) == ("Packages", "main") and release.isalpha() and "debian" in uri:
            return uri
    raise Stop("apt has no source of Debian's packages: /etc/apt/sources.list.d lacks the component main")


def unpack(root: Path, work: Path, architecture: str, packages: tuple[str, ...], release: str = "") -> None:
    """Unpack packages and what they depend on into `root`.

    Args:
        root: directory that becomes the root of the small system.
        work: directory for apt's state and the downloads.
        architecture: Debian's name, such as arm64.
        packages: their names.
        release: another one than this system's, by its code name.

    Raises Stop if apt cannot get them: says why.
    """
    state, cache = work / "apt", work / "apt" / "cache"
    for directory in state / "lists" / "partial", state / "parts", cache / "archives" / "partial":
        directory.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = [f"APT::Architecture={architecture}", f"APT::Architectures={architecture}", "APT::Sandbox::User=root"]
    options += ["APT::Install-Recommends=false", f"Dir::State={state}", f"Dir::State::status={state / 'status'}", f"Dir::Cache={cache}"]
    if release:
        (state / "sources.list").write_text(f"deb {archive()} {release} main\n")
        options += [f"Dir::Etc::sourcelist={state / 'sources.list'}", f"Dir::Etc::sourceparts={state / 'parts'}"]
    apt = ["apt-get", "-qq", "-y", *(f"-o{option}" for option in options)]
    call(*apt, "update")
    shutil.rmtree(cache / "archives")  # it may hold other or older packages
    (cache / "archives" / "partial").mkdir(parents=True)
    call(*apt, "--download-only", "install", *packages)
    for package in sorted((cache / "archives").glob("*.deb")):
        call("dpkg", "-x", package, root)
