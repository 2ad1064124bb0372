//! Names of VMs and hosts: their syntax, defaults for clones, and how a name or a prefix of an id finds its thing.

use std::collections::BTreeSet;

use ramet_client::api::ErrorCode;

use crate::error::{ApiError, ApiResult};

/// Longest name of a VM.
pub const MAX_NAME: usize = 63;
/// Shortest prefix of an id that is accepted.
pub const MIN_PREFIX: usize = 4;

/// Refuses what is no name of a VM.
///
/// # Errors
/// [`ErrorCode::BadName`], which tells the rule.
pub fn check_vm_name(name: &str) -> ApiResult<()> {
    let good = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if !good {
        return Err(ApiError::new(ErrorCode::BadName, format!("'{}' is no name for a VM", shown(name))).remedy(
            format!("use 1 to {MAX_NAME} of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter or digit"),
        ));
    }
    if name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ApiError::new(ErrorCode::BadName, format!("The name '{name}' looks like an id"))
            .remedy("choose a name that is not 32 hexadecimal digits"));
    }
    Ok(())
}

/// Refuses what is no name of a host: it stands in certificates, so the rule is that of DNS labels.
///
/// # Errors
/// [`ErrorCode::BadName`], which tells the rule.
pub fn check_host_name(name: &str) -> ApiResult<()> {
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::BadName, format!("'{}' is no name for a host", shown(name)))
        .remedy("use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"))
}

/// Text of a user made fit to be shown: short and without control characters.
#[must_use]
pub fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

/// `PARENT-cNUMBER` with the lowest number from 1 that `taken` does not have. A parent's name that is too long for it
/// is cut.
#[must_use]
pub fn default_clone_name(parent: &str, taken: &BTreeSet<String>) -> String {
    let mut number = 1u64;
    loop {
        let suffix = format!("-c{number}");
        let keep = parent.len().min(MAX_NAME - suffix.len());
        let name = format!("{}{suffix}", parent.get(..keep).unwrap_or("vm"));
        if !taken.contains(&name) {
            return name;
        }
        number += 1;
    }
}

/// Finds one of `things` by exact name, by id, or by unique prefix of its id.
///
/// # Errors
/// [`ErrorCode::NotFound`] and [`ErrorCode::Ambiguous`], which name the thing and `kind`.
pub fn resolve<'a, T>(
    kind: &str,
    list_command: &str,
    wanted: &str,
    things: impl IntoIterator<Item = (T, String, Option<&'a str>)>,
) -> ApiResult<T> {
    let wanted_id = wanted.to_ascii_lowercase();
    let prefix = wanted.len() >= MIN_PREFIX && wanted_id.bytes().all(|b| b.is_ascii_hexdigit());
    let (mut found, mut ids) = (Vec::new(), Vec::new());
    for (thing, id, name) in things {
        if name == Some(wanted) || id == wanted_id {
            return Ok(thing);
        }
        if prefix && id.starts_with(&wanted_id) {
            found.push(thing);
            ids.push(id);
        }
    }
    match (found.pop(), found.len()) {
        (Some(thing), 0) => Ok(thing),
        (None, _) => Err(ApiError::new(ErrorCode::NotFound, format!("No {kind} '{}'", shown(wanted)))
            .remedy(format!("`{list_command}` lists them"))),
        (Some(_), more) => Err(ApiError::new(
            ErrorCode::Ambiguous,
            format!("'{wanted}' fits {} {kind}s: {}", more + 1, ids.join(", ")),
        )
        .remedy("give more digits of the id")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_names() {
        for good in ["a", "web-1", "A.b_c", "0x", &"x".repeat(63)] {
            check_vm_name(good).unwrap();
        }
        for bad in ["", "-a", ".a", "a b", "ä", "a/b", "a\n", &"x".repeat(64), "0123456789abcdef0123456789abcdef"] {
            let err = check_vm_name(bad).unwrap_err();
            assert_eq!(err.code(), ErrorCode::BadName, "{bad:?}");
            assert!(err.body().remedy.is_some());
            assert!(!err.to_string().contains('\n'));
        }
    }

    #[test]
    fn host_names() {
        check_host_name("h1").unwrap();
        check_host_name("rack-2-node-7").unwrap();
        for bad in ["", "H1", "a_b", "-a", "a-", "a.b", &"x".repeat(64)] {
            assert_eq!(check_host_name(bad).unwrap_err().code(), ErrorCode::BadName, "{bad:?}");
        }
    }

    #[test]
    fn clone_names_take_the_lowest_free_number_and_stay_legal() {
        let mut taken: BTreeSet<String> = ["web-c1", "web-c3"].map(str::to_owned).into();
        let second = default_clone_name("web", &taken);
        assert_eq!(second, "web-c2");
        taken.insert(second);
        assert_eq!(default_clone_name("web", &taken), "web-c4");
        let mut name = "root".to_owned();
        for _ in 0..50 {
            name = default_clone_name(&name, &taken);
            check_vm_name(&name).unwrap();
            assert!(taken.insert(name.clone()), "{name} twice");
        }
    }

    #[test]
    fn names_come_before_prefixes_and_ambiguity_is_told() {
        let things = || [(1, "abcd1111".to_owned(), Some("web")), (2, "abcd2222".to_owned(), Some("abcd1"))];
        let find = |wanted: &str| resolve("VM", "ramet ps", wanted, things());
        assert_eq!(find("web").unwrap(), 1);
        assert_eq!(find("abcd1").unwrap(), 2, "a name wins over a prefix");
        assert_eq!(find("ABCD11").unwrap(), 1);
        assert_eq!(find("abcd").unwrap_err().code(), ErrorCode::Ambiguous);
        assert_eq!(find("abc").unwrap_err().code(), ErrorCode::NotFound, "too short");
        let err = find("zzzz").unwrap_err();
        assert!(err.to_string().contains("No VM 'zzzz'") && err.to_string().contains("ramet ps"), "{err}");
    }
}
