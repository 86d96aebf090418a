//! `include/ringferry.h` is what cbindgen makes of the source, and the other files that name a version agree.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::fs;
use std::path::Path;

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// What the header has to be.
fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut header = Vec::new();
    cbindgen::Builder::new().with_crate(root).with_config(config).generate().unwrap().write(&mut header);
    // cbindgen puts the name of the enum before each of its values, and speaks to Rust programmers.
    String::from_utf8(header)
        .unwrap()
        .replace("RF_STATUS_", "RF_")
        .replace("# Safety\n", "The caller sees to it that:\n")
}

#[test]
fn the_header_is_what_the_source_says() {
    let (now, wanted) = (read("include/ringferry.h"), generated());
    if now == wanted {
        return;
    }
    if std::env::var_os("RINGFERRY_WRITE_HEADER").is_some() {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/ringferry.h"), wanted).unwrap();
        return;
    }
    let line = now.lines().zip(wanted.lines()).position(|(now, wanted)| now != wanted);
    panic!(
        "include/ringferry.h is out of date from line {:?} on: RINGFERRY_WRITE_HEADER=1 cargo test -p ringferry-capi --test header",
        line.map(|line| line + 1)
    );
}

#[test]
fn versions_agree_wherever_one_is_named() {
    let header = read("include/ringferry.h");
    let number = |name: &str| {
        let line = header.lines().find(|line| line.starts_with(&format!("#define {name} "))).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    let major = number("RF_ABI_MAJOR");
    assert!(read("build.rs").contains(&format!("libringferry_capi.so.{major}\"")));
    let version = format!("{major}.{}.{}", number("RF_ABI_MINOR"), number("RF_ABI_PATCH"));
    for file in ["ringferry.pc", "ringferry-static.pc"] {
        assert!(read(file).contains(&format!("\nVersion: {version}\n")), "{file}");
    }
}
