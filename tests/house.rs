//! The house stays in order: no file is too long to read, and no files of `src/` import each other in a circle.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

/// The longest that a Rust file may be.
const LINES_MAX: usize = 600;

/// Types that end like those which grow, and are not open yet.
const SETTLED: [&str; 4] = ["Event", "SourceReport", "ChannelReport", "LossReport"];

/// A path within the crate, from its root: `["track", "rings"]`.
type ModulePath = Vec<String>;

/// The code of one file, outside its tests.
struct Module {
    file: String,
    /// Names of the items that the file defines.
    items: BTreeSet<String>,
    imports: Vec<Import>,
    /// Names that the code mentions, imports left out.
    mentioned: BTreeSet<String>,
}

/// A leaf of a `use`, or a path in the code that begins with `crate`, `self` or `super`.
#[derive(Clone)]
struct Import {
    path: ModulePath,
    /// The name that it has here.
    name: String,
    /// Others can reach it through this file.
    is_reexport: bool,
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                rust_files(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn relative(file: &Path) -> String {
    file.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

/// Words, numbers, `::` and single marks; comments and literals left out.
fn tokens(code: &str) -> Vec<String> {
    let chars: Vec<char> = code.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\n');
    let find = |from: usize, end: &str| {
        let end: Vec<char> = end.chars().collect();
        (from..chars.len()).find(|i| chars[*i..].starts_with(&end)).map_or(chars.len(), |i| i + end.len())
    };
    let (mut tokens, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        let hashes = (i + 1..).take_while(|i| at(*i) == '#').count();
        match chars[i] {
            '/' if at(i + 1) == '/' => i = find(i, "\n"),
            '/' if at(i + 1) == '*' => i = find(i, "*/"),
            'r' if at(i + 1 + hashes) == '"' => {
                i = find(i + 2 + hashes, &format!("\"{}", "#".repeat(hashes)))
            }
            '"' => {
                i += 1;
                while i < chars.len() && chars[i] != '"' {
                    i += if chars[i] == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            '\'' if at(i + 1) == '\\' => i = find(i + 3, "'"),
            '\'' if at(i + 2) == '\'' => i += 3,
            c if c.is_alphanumeric() || c == '_' => {
                let word: String =
                    chars[i..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                i += word.chars().count();
                tokens.push(word);
            }
            ':' if at(i + 1) == ':' => {
                tokens.push("::".to_owned());
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(c.to_string());
                }
                i += 1;
            }
        }
    }
    tokens
}

/// The index behind the mark that closes the one at `open`.
fn closed(tokens: &[String], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        depth += match token.as_str() {
            "(" | "[" | "{" => 1,
            ")" | "]" | "}" => -1,
            _ => 0,
        };
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Without the items that only tests compile.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let is_test = |i: usize| tokens[i..].iter().take(7).eq(&["#", "[", "cfg", "(", "test", ")", "]"]);
    let (mut kept, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        if !is_test(i) {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        while tokens.get(i).is_some_and(|token| token == "#") {
            i = closed(tokens, i + 1);
        }
        while tokens.get(i).is_some_and(|token| token != ";" && token != "{") {
            i += 1;
        }
        i = closed(tokens, i);
    }
    kept
}

/// The leaves of a `use` tree that begins at `*i`.
fn use_tree(
    tokens: &[String],
    i: &mut usize,
    prefix: &[String],
    is_reexport: bool,
    leaves: &mut Vec<Import>,
) {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(*i) {
        *i += 1;
        match token.as_str() {
            "::" => continue,
            "{" => {
                while tokens.get(*i).is_some_and(|token| token != "}") {
                    use_tree(tokens, i, &path, is_reexport, leaves);
                    *i += usize::from(tokens.get(*i).is_some_and(|token| token == ","));
                }
                *i += 1;
                return;
            }
            word => path.push(word.to_owned()),
        }
        if tokens.get(*i).is_none_or(|token| token != "::") {
            break;
        }
    }
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let mut name = path.last().cloned().unwrap_or_default();
    if tokens.get(*i).is_some_and(|token| token == "as") {
        name = tokens[*i + 1].clone();
        *i += 2;
    }
    leaves.push(Import { path, name, is_reexport });
}

fn parse(file: String, code: &str) -> Module {
    const ITEMS: [&str; 9] =
        ["fn", "struct", "enum", "trait", "type", "const", "static", "union", "macro_rules"];
    let tokens = without_tests(&tokens(code));
    let (items, imports, mentioned) = Default::default();
    let mut module = Module { file, items, imports, mentioned };
    let mut i = 0;
    while i < tokens.len() {
        let token = tokens[i].as_str();
        if token == "use" {
            let is_reexport = i > 0 && (tokens[i - 1] == "pub" || tokens[i - 1] == ")");
            i += 1;
            use_tree(&tokens, &mut i, &[], is_reexport, &mut module.imports);
        } else if matches!(token, "crate" | "self" | "super")
            && tokens.get(i + 1).is_some_and(|next| next == "::")
        {
            use_tree(&tokens, &mut i, &[], false, &mut module.imports);
        } else {
            if ITEMS.contains(&token)
                && let Some(name) = tokens[i + 1..].iter().find(|token| *token != "!")
            {
                module.items.insert(name.clone());
            }
            module.mentioned.insert(tokens[i].clone());
            i += 1;
        }
    }
    module
}

/// Every file of `src/` but those of tests, by module path.
fn house() -> BTreeMap<ModulePath, Module> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut modules = BTreeMap::new();
    for file in files {
        let inside = file.strip_prefix(root().join("src")).unwrap().with_extension("");
        let mut path: ModulePath = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if path.iter().any(|part| part == "tests") {
            continue;
        }
        if path.last().is_some_and(|last| last == "mod" || last == "lib") {
            path.pop();
        }
        modules.insert(path, parse(relative(&file), &fs::read_to_string(&file).unwrap()));
    }
    modules
}

/// The module whose file defines what an import of `from` names; none if it is not of this crate.
fn definition(
    house: &BTreeMap<ModulePath, Module>,
    from: &ModulePath,
    import: &[String],
    depth: u8,
) -> Option<ModulePath> {
    let mut at = from.clone();
    let mut rest = import;
    match import.first()?.as_str() {
        "crate" => at.clear(),
        "self" => {}
        "super" => drop(at.pop()),
        first => {
            let child: ModulePath = from.iter().cloned().chain([first.to_owned()]).collect();
            house.get(&child)?;
        }
    }
    if matches!(import[0].as_str(), "crate" | "self" | "super") {
        rest = &rest[1..];
    }
    while let Some(next) = rest.first() {
        let child: ModulePath = at.iter().cloned().chain([next.clone()]).collect();
        if next == "super" {
            at.pop();
        } else if house.contains_key(&child) {
            at = child;
        } else {
            break;
        }
        rest = &rest[1..];
    }
    let module = house.get(&at)?;
    let Some(name) = rest.first().filter(|name| !module.items.contains(*name) && depth > 0) else {
        return Some(at);
    };
    let passed_on = module.imports.iter().find(|import| import.name == *name && import.path.len() > 1);
    match passed_on {
        Some(import) => definition(house, &at, &import.path, depth - 1),
        None => Some(at),
    }
}

/// Which files each file needs: those that define what it imports. What it only passes on, it does not need.
fn needs(house: &BTreeMap<ModulePath, Module>) -> BTreeMap<&str, BTreeMap<&str, String>> {
    let mut needs = BTreeMap::new();
    for (path, module) in house {
        let of: &mut BTreeMap<&str, String> = needs.entry(module.file.as_str()).or_default();
        for import in &module.imports {
            if import.is_reexport && !module.mentioned.contains(&import.name) {
                continue;
            }
            if let Some(definition) = definition(house, path, &import.path, 8).filter(|found| found != path) {
                of.entry(house[&definition].file.as_str()).or_insert_with(|| import.name.clone());
            }
        }
    }
    needs
}

/// The shortest way from `start` back to `start`, if there is one.
fn circle<'a>(
    needs: &'a BTreeMap<&'a str, BTreeMap<&'a str, String>>,
    start: &'a str,
) -> Option<Vec<&'a str>> {
    let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(file) = queue.pop_front() {
        for next in needs[file].keys() {
            if *next == start {
                let mut way = vec![file];
                while let Some(before) = way.last().filter(|file| **file != start).map(|file| came_from[file])
                {
                    way.push(before);
                }
                way.reverse();
                return Some(way);
            }
            if !came_from.contains_key(next) {
                came_from.insert(next, file);
                queue.push_back(next);
            }
        }
    }
    None
}

/// Every shortest circle, step by step.
fn circles(house: &BTreeMap<ModulePath, Module>) -> BTreeSet<String> {
    let needs = needs(house);
    let mut circles = BTreeSet::new();
    for start in needs.keys() {
        if let Some(way) = circle(&needs, start) {
            let first = way.iter().enumerate().min_by_key(|(_, file)| **file).unwrap().0;
            let way: Vec<_> = way.iter().cycle().skip(first).take(way.len() + 1).collect();
            let steps = way
                .windows(2)
                .map(|step| format!("\n  {} takes `{}` from {}", step[0], needs[step[0]][step[1]], step[1]));
            circles.insert(steps.collect::<String>());
        }
    }
    circles
}

#[test]
fn no_files_of_the_library_import_each_other_in_a_circle() {
    let circles: Vec<_> = circles(&house()).into_iter().collect();
    assert!(circles.is_empty(), "{} circles:{}", circles.len(), circles.join("\n"));
}

#[test]
fn a_circle_is_found_through_what_a_parent_passes_on_and_none_where_only_tests_or_comments_close_it() {
    let house = |files: &[(&str, &str)]| -> BTreeMap<ModulePath, Module> {
        let path = |file: &str| file.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        files.iter().map(|(file, code)| (path(file), parse((*file).to_owned(), code))).collect()
    };
    let lib = ("", "mod a; mod b; pub use a::inner::Thing;");
    let a = ("a", "mod inner; pub use self::inner::{Other as Renamed, Thing};");
    let inner = ("a/inner", "use crate::b::user; pub struct Thing; pub struct Other;");
    let closing = ("b", "use super::a::{Renamed}; pub fn user() {}");
    let found = circles(&house(&[lib, a, inner, closing]));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found.first().unwrap().contains("b takes `Renamed` from a/inner"), "{found:?}");
    let open = "// use crate::Thing;\n#[cfg(test)]\nmod tests { use super::super::Thing; }\n\
        pub fn user() { let _ = \"use crate::Thing;\"; }";
    assert_eq!(circles(&house(&[lib, a, inner, ("b", open)])), BTreeSet::new());
}

/// The declarations that others see, with what stands before them: `pub` and not `pub(crate)`, outside tests, in the library.
fn public_declarations() -> Vec<(String, Vec<String>, Vec<String>)> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut found = Vec::new();
    for file in files.iter().filter(|file| !relative(file).contains("tests")) {
        let tokens = without_tests(&tokens(&fs::read_to_string(file).unwrap()));
        for (i, _) in tokens.iter().enumerate().filter(|(i, token)| *token == "pub" && tokens[i + 1] != "(") {
            let since = tokens[..i].iter().rposition(|token| matches!(token.as_str(), ";" | "{" | "}"));
            let before = tokens[since.map_or(0, |at| at + 1)..i].to_vec();
            // A field ends with its comma, outside all brackets; anything else where its body or value begins.
            let (is_field, mut depth) = (tokens[i + 2] == ":", 0_i32);
            let end = tokens[i..].iter().position(|token| {
                match token.as_str() {
                    "<" | "(" | "[" => depth += 1,
                    ">" | ")" | "]" => depth -= 1,
                    "," | "}" => return is_field && depth <= 0,
                    ";" | "{" | "=" => return true,
                    _ => {}
                }
                false
            });
            found.push((relative(file), before, tokens[i..end.map_or(tokens.len(), |at| i + at)].to_vec()));
        }
    }
    found
}

/// What grows, and what nobody outside makes: why something failed, and what was counted, reported or told.
#[test]
fn errors_reports_and_events_can_grow_without_breaking_anybody() {
    let grows = |name: &str| {
        ["Error", "Failure", "Report", "Figures", "Snapshot", "Totals", "Loss", "Event"]
            .iter()
            .any(|kind| name.ends_with(kind))
    };
    let settled = |name: &String| SETTLED.contains(&name.as_str());
    let rigid: Vec<_> = public_declarations()
        .into_iter()
        .filter(|(_, _, code)| matches!(code[1].as_str(), "enum" | "struct") && grows(&code[2]))
        .filter(|(_, before, code)| !before.iter().any(|word| word == "non_exhaustive") && !settled(&code[2]))
        .map(|(file, _, code)| format!("{file}: {}", code[2]))
        .collect();
    assert!(rigid.is_empty(), "without #[non_exhaustive]: {rigid:#?}");
}

/// A VMM takes its own versions of these crates: none of their types may be in what the library asks of it or gives it, but for
/// vm-memory's behind the feature that names its version.
#[test]
fn no_type_of_another_crate_is_in_a_public_signature() {
    const FOREIGN: [&str; 14] = [
        "bitvec",
        "crc32c",
        "getrandom",
        "io_uring",
        "kvm_bindings",
        "kvm_ioctls",
        "memmap2",
        "parking_lot",
        "rustix",
        "serde",
        "socket2",
        "thiserror",
        "xxhash_rust",
        "zerocopy",
    ];
    let house = house();
    let imported = |file: &str| -> BTreeSet<String> {
        let module = house.values().find(|module| module.file == file);
        let imports = module.into_iter().flat_map(|module| &module.imports);
        let foreign = imports.filter(|import| FOREIGN.contains(&import.path[0].as_str()));
        foreign.map(|import| import.name.clone()).collect()
    };
    let mut leaks = Vec::new();
    // What a private file declares, others see only if it is passed on.
    let is_passed_on = |file: &str| {
        let path = house.iter().find(|(_, module)| module.file == file).map(|(path, _)| path);
        let name = path.and_then(|path| path.last()).cloned().unwrap_or_default();
        let passes = |import: &Import| import.is_reexport && import.path.contains(&name);
        house.values().any(|module| module.imports.iter().any(passes))
    };
    for (file, _, code) in public_declarations().into_iter().filter(|(file, ..)| is_passed_on(file)) {
        let foreign = imported(&file);
        let is_foreign = |word: &&String| foreign.contains(*word) || FOREIGN.contains(&word.as_str());
        if code[1] != "use"
            && code[1] != "mod"
            && let Some(word) = code[3.min(code.len())..].iter().find(is_foreign)
        {
            leaks.push(format!("{file}: {word} in `{}`", code.join(" ")));
        }
    }
    assert!(leaks.is_empty(), "{leaks:#?}");
}

#[test]
fn no_file_is_longer_than_600_lines() {
    let mut files = Vec::new();
    rust_files(root(), &mut files);
    let lines = |file: &PathBuf| fs::read_to_string(file).unwrap().lines().count();
    let long: Vec<_> =
        files.iter().filter(|file| lines(file) > LINES_MAX).map(|file| relative(file)).collect();
    assert!(long.is_empty(), "files of more than {LINES_MAX} lines: {long:?}");
}
