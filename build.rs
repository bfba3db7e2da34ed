//! Builds the exerciser, the freestanding test guest that `ferry demo` boots, and names it to `src` as
//! `FERRY_EXERCISER`.
//!
//! Cargo cannot build it as a package: machines that build ferry have the standard library of their own target
//! only, and the guest needs other link arguments than the programs around it. So `rustc` is called here, on the
//! two libraries that the guest is made of and on its own few files.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const EDITION: &str = "2024";
/// Sources that the guest is made of.
const SOURCES: [&str; 3] = ["devices/nvme-spec/src", "resources/exerciser/src", "resources/exerciser/guest"];

fn main() {
    if let Err(message) = build() {
        eprintln!("error: building the exerciser guest: {message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    let target = variable("TARGET")?;
    if !target.starts_with("x86_64-") {
        return Err(format!("it exists for x86_64 only, not for {target}"));
    }
    let compiler = Compiler { rustc: variable("RUSTC")?, target, output: variable("OUT_DIR")?.into() };
    compiler.check_linker()?;

    let spec = compiler.library("nvme_spec", "devices/nvme-spec/src/lib.rs", None)?;
    let logic =
        compiler.library("exerciser", "resources/exerciser/src/lib.rs", Some(("nvme_spec", &spec)))?;
    let guest = compiler.guest("resources/exerciser/guest", &logic)?;
    println!("cargo:rustc-env=FERRY_EXERCISER={}", guest.display());
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("reading {name}, which cargo sets for build scripts: {error}"))
}

struct Compiler {
    rustc: String,
    target: String,
    output: PathBuf,
}

impl Compiler {
    /// The linker that comes with the toolchain: no other one has to be installed.
    fn check_linker(&self) -> Result<(), String> {
        let sysroot = self.run(Command::new(&self.rustc).args(["--print", "sysroot"]))?;
        let host = self.run(Command::new(&self.rustc).args(["--print", "host-tuple"]))?;
        let linker = Path::new(sysroot.trim()).join("lib/rustlib").join(host.trim()).join("bin/rust-lld");
        if linker.exists() {
            Ok(())
        } else {
            Err(format!("the toolchain has no {}; toolchains installed by rustup have it", linker.display()))
        }
    }

    /// Flags of every crate: code that runs where it is linked, with no unwinding.
    fn command(&self, name: &str, source: &str) -> Command {
        let mut command = Command::new(&self.rustc);
        command.args([source, "--edition", EDITION, "--crate-name", name, "--target", &self.target]);
        command.args(["-Copt-level=3", "-Cpanic=abort", "-Crelocation-model=static", "-Coverflow-checks=on"]);
        command.arg("-L").arg(&self.output);
        command
    }

    fn library(&self, name: &str, source: &str, uses: Option<(&str, &Path)>) -> Result<PathBuf, String> {
        let library = self.output.join(format!("lib{name}.rlib"));
        let mut command = self.command(name, source);
        command.args(["--crate-type", "rlib", "-o"]).arg(&library);
        if let Some((name, path)) = uses {
            command.arg("--extern").arg(named(name, path));
        }
        self.run(&mut command)?;
        Ok(library)
    }

    fn guest(&self, folder: &str, logic: &Path) -> Result<PathBuf, String> {
        let image = self.output.join("exerciser.elf");
        let mut command = self.command("exerciser_guest", &format!("{folder}/main.rs"));
        command.args([
            "--crate-type",
            "bin",
            "-Cstrip=symbols",
            "-Clinker=rust-lld",
            "-Clinker-flavor=ld.lld",
        ]);
        let script = format!("-T{folder}/link.ld");
        for argument in ["-nostdlib", "-static", "-no-pie", "--build-id=none", "-znorelro", &script] {
            command.arg(format!("-Clink-arg={argument}"));
        }
        command.arg("--extern").arg(named("exerciser", logic)).arg("-o").arg(&image);
        self.run(&mut command)?;
        Ok(image)
    }

    fn run(&self, command: &mut Command) -> Result<String, String> {
        let output = command.output().map_err(|error| format!("starting {command:?}: {error}"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!(
                "{command:?} failed ({}):\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ))
        }
    }
}

fn named(name: &str, path: &Path) -> impl AsRef<OsStr> {
    let mut argument = std::ffi::OsString::from(format!("{name}="));
    argument.push(path);
    argument
}
