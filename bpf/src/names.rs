//! What an operator calls a VM: taken from the command line of the VMM that runs it.

use std::fs;
use std::path::Path;

/// Names longer than this are cut.
const NAME_CHARS_MAX: usize = 48;

/// The name of the VM that this process runs, by the command line of QEMU, Cloud Hypervisor, Firecracker or
/// Ringferry; for any other program, the program's name; `None` if the process is gone.
pub fn vm_name(pid: u32) -> Option<String> {
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments: Vec<String> = command_line
        .split(|&byte| byte == 0)
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let program = arguments.first().filter(|program| !program.is_empty()).cloned();
    let program = program.or_else(|| fs::read_to_string(format!("/proc/{pid}/comm")).ok())?;
    Some(printable(&name_by_arguments(&program, &arguments)))
}

fn name_by_arguments(program: &str, arguments: &[String]) -> String {
    let program = stem(program);
    let option = |name| option(arguments, name);
    let socket = |name| option(name).map(|value| stem(value.strip_prefix("path=").unwrap_or(value)));
    let name = if program.starts_with("qemu") || program == "kvm" {
        option("name").map(qemu_name).or_else(|| option("uuid").map(str::to_owned))
    } else if program.starts_with("cloud-hypervisor") {
        socket("api-socket")
    } else if program.starts_with("firecracker") {
        option("id").map(str::to_owned).or_else(|| socket("api-sock"))
    } else if program.starts_with("ringferry") {
        option("name").map(str::to_owned)
    } else {
        None
    };
    name.filter(|name| !name.is_empty()).unwrap_or(program)
}

/// The value of `-name value`, `--name value` or `--name=value`.
fn option<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    arguments.iter().enumerate().skip(1).find_map(|(index, argument)| {
        let rest = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'))?.strip_prefix(name)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value),
            None if rest.is_empty() => arguments.get(index + 1).map(String::as_str),
            None => None,
        }
    })
}

/// `guest=a,,b,debug-threads=on` or `a,,b,process=c`: a doubled comma stands for one.
fn qemu_name(value: &str) -> String {
    let mut fields = vec![String::new()];
    let mut characters = value.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(character);
        }
    }
    let named = fields.iter().find_map(|field| field.strip_prefix("guest="));
    named
        .or_else(|| fields.first().map(String::as_str).filter(|first| !first.contains('=')))
        .unwrap_or("")
        .to_owned()
}

fn stem(path: &str) -> String {
    let name = Path::new(path.trim()).file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(".sock").or_else(|| name.strip_suffix(".socket")).unwrap_or(&name).to_owned()
}

/// A command line is written by others: nothing in it may steer our terminal or break a line of output.
fn printable(name: &str) -> String {
    let clean = |character: char| if character.is_control() { '?' } else { character };
    name.chars().take(NAME_CHARS_MAX).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(command_line: &str) -> String {
        let arguments: Vec<String> = command_line.split(' ').map(str::to_owned).collect();
        name_by_arguments(&arguments[0], &arguments)
    }

    #[test]
    fn a_vm_is_called_what_its_vmm_was_told() {
        for (command_line, name) in [
            ("/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -m 1G", "web"),
            ("qemu-system-x86_64 -m 1G -name web,process=x", "web"),
            ("qemu-system-x86_64 --name a,,b", "a,b"),
            ("/usr/libexec/qemu-kvm -uuid 0e0a -m 1G", "0e0a"),
            ("qemu-system-x86_64 -m 1G", "qemu-system-x86_64"),
            ("qemu-system-x86_64 -name debug-threads=on", "qemu-system-x86_64"),
            ("cloud-hypervisor --api-socket path=/run/vm/db.sock --memory size=1G", "db"),
            ("cloud-hypervisor --api-socket=/run/vm/db.sock", "db"),
            ("/srv/firecracker --id 551e --start-time-us 1", "551e"),
            ("firecracker --api-sock /tmp/fc7.socket", "fc7"),
            ("ringferry run --name guest1", "guest1"),
            ("ringferry-testvm", "ringferry-testvm"),
            ("/usr/bin/crosvm run --name x", "crosvm"),
            ("qemu-system-x86_64 -name", "qemu-system-x86_64"),
        ] {
            assert_eq!(name_of(command_line), name, "{command_line}");
        }
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2J\nb"), "a?[2J?b");
        assert_eq!(printable(&"x".repeat(1000)).len(), NAME_CHARS_MAX);
    }
}
