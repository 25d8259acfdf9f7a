use super::*;

fn problems(text: &str) -> String {
    load_text("t.toml", text, Vec::new()).unwrap_err().to_string()
}

fn with(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    load_text("t.toml", text, variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
}

/// A certificate that signed itself, and its key.
struct TlsFiles {
    cert: tempfile::NamedTempFile,
    key: tempfile::NamedTempFile,
}

impl TlsFiles {
    fn new() -> TlsFiles {
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
        let written = |text: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            file
        };
        TlsFiles { cert: written(&cert.pem()), key: written(&key.serialize_pem()) }
    }
}

#[test]
fn exports_that_could_not_be_declared_are_refused_with_their_line() {
    let nbd = "nbd = true";
    let vhost_user = "vhost_user = \"/run/a\"";
    let relative = format!("vhost_user = {:?}", "a".repeat(107));
    for (target, rest, place, why) in [
        (nbd, "mode = \"0660\"", "4: export.0.mode: ", "socket of its own"),
        (nbd, "group = \"root\"", "4: export.0.group: ", "socket of its own"),
        (nbd, "queues = 2", "4: export.0.queues: ", "vhost-user"),
        (nbd, "tls_allow = [\"a\"]", "4: export.0.tls_allow: ", "needs [tls]"),
        (vhost_user, "tls_allow = [\"a\"]", "4: export.0.tls_allow: ", "is for NBD"),
        (vhost_user, "queues = 0", "4: export.0.queues: ", "1 to 256"),
        (vhost_user, "group = \"no-such-group-here\"", "4: export.0.group: ", "does not exist"),
        (&relative, "", "3: export.0.vhost_user: ", "107"),
    ] {
        let refused = problems(&format!("[[export]]\nvolume = \"a\"\n{target}\n{rest}\n"));
        assert!(refused.starts_with(&format!("t.toml:{place}")) && refused.contains(why), "{refused}");
    }
    assert!(problems("[[export]]\nvolume = \"A b\"\nnbd = true\n").starts_with("t.toml:2: export.0.volume: "));
    let relative = format!("[daemon]\nnbd = [\"unix:{}\"]\n", "a".repeat(107));
    assert!(problems(&relative).contains("107"));
    let twice = problems(&format!("[[export]]\nvolume = \"a\"\n{vhost_user}\n").repeat(2));
    assert!(twice.starts_with("t.toml:6: export.1.vhost_user: export.0.vhost_user listens"), "{twice}");
}

#[test]
fn the_example_is_valid_with_and_without_its_comments() {
    load_text("example", EXAMPLE, Vec::new()).unwrap();
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "0123456789abcdef").unwrap();
    let everything: Vec<String> = EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.contains(" = ") || rest.starts_with('[') => rest.to_owned(),
            Some(_) => String::new(),
            None => line.to_owned(),
        })
        .collect();
    let everything = everything.join("\n").replace("/etc/novastor/token", &key.path().display().to_string());
    let everything = ["s3.id", "s3.key"]
        .iter()
        .fold(everything, |text, name| text.replace(&format!("/etc/novastor/{name}"), &key.path().display().to_string()));
    let tls = TlsFiles::new();
    let everything = everything
        .replace("/etc/novastor/tls.key", tls.key.path().to_str().unwrap())
        .replace("/etc/novastor/tls.crt", tls.cert.path().to_str().unwrap())
        .replace("/etc/novastor/ca.crt", tls.cert.path().to_str().unwrap())
        .replace("\"kvm\"", "\"root\"");
    let kek_file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kek_file.path(), "ab".repeat(32)).unwrap();
    let kek = kek_file.path().display().to_string();
    let everything = everything.replace("/etc/novastor/kek.old", &kek).replace("/etc/novastor/kek", &kek);
    let config = load_text("example", &everything, Vec::new()).unwrap();
    assert_eq!(config.export.len(), 2);
    assert_eq!(config.pool.len(), 4);
}

#[test]
fn unknown_keys_name_the_nearest_the_file_and_the_line() {
    assert_eq!(
        problems("[daemon]\nthreads = 2\nsokcet_mode = \"0660\"\n"),
        "t.toml:3: unknown key `sokcet_mode` in [daemon]: did you mean `socket_mode`?"
    );
    assert_eq!(problems("[deamon]\n"), "t.toml:1: unknown key `deamon` in the file: did you mean `daemon`?");
    let far = problems("[log]\ncolour = 1\n");
    assert_eq!(far, "t.toml:2: unknown key `colour` in [log]: it knows format, level");
    assert!(problems("[pool.a]\ndriver = \"file\"\npaht = \"/a\"\n").contains("did you mean `path`"));
    assert!(problems("[[export]]\nvolume = \"a\"\nnbd = true\nqueue = 1\n").starts_with("t.toml:4: "));
}

#[test]
fn wrong_types_name_the_line() {
    let text = problems("[daemon]\nnode = \"a\"\nthreads = \"two\"\n");
    assert!(text.starts_with("t.toml:3: daemon.threads: invalid type: string \"two\""), "{text}");
    assert!(problems("[daemon]\nthreads = -1\n").starts_with("t.toml:2: daemon.threads"));
    assert!(problems("[daemon]\nnbd = \"unix:a\"\n").starts_with("t.toml:2: daemon.nbd"));
    assert!(problems("[daemon]\nnbd = [\n \"unix:a\",\n 7]\n").starts_with("t.toml:4: daemon.nbd.1"));
    assert!(problems("[log]\nformat = \"xml\"\n").starts_with("t.toml:2: log.format"));
    assert!(problems("daemon = 3\n").starts_with("t.toml:1: daemon"));
    assert!(problems("[daemon\n").starts_with("t.toml:1: "));
    assert!(problems("[daemon]\nthreads = 1\nthreads = 2\n").starts_with("t.toml:3: "));
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    assert!(problems("[pool.n]\ndriver = \"nfs\"\nurl = \"nfs://a/b\"\n").contains("file, rbd, s3, memory, null"));
    assert!(problems("[pool.n]\ndriver = \"fiel\"\n").contains("did you mean \"file\"?"));
    assert!(problems("[pool.n]\npath = \"/a\"\n").contains("needs a driver"));
    assert!(problems("[pool.n]\ndriver = \"null\"\npath = \"/a\"\n").contains("has no key `path`"));
    assert!(problems("[pool.n]\ndriver = \"rbd\"\n").contains("needs the key `pool`"));
    assert!(problems("[pool.Bad]\ndriver = \"null\"\n").contains("pool name"));
    assert!(problems("[policy.gold]\niops = 5\n").contains("`iops` is not in this version"));
    for section in ["policy.gold", "pool.p"] {
        let told = problems(&format!("[{section}]\ndurability = \"mirror\"\n"));
        assert!(told.contains("\"mirror\" is not in this version; those that work: local, remote"), "{told}");
    }
    assert!(problems("[policy.gold]\ndurability = \"none\"\n").contains("local, remote"));
    assert!(problems("[policy.gold]\ncompression = \"gzip\"\n").contains("auto, cold, none, lz4, zstd"));
    assert!(problems("[policy.gold]\ndedup = \"host\"\n").contains("none, volume, tenant"));
    assert!(problems("[policy.gold]\nwhen_full = \"stall\"\n").contains("wait, error"));
    assert!(problems("[pool.p]\ndriver = \"file\"\npath = \"/a\"\nwhen_full = \"stop\"\n").contains("wait, error"));
    assert!(problems("[pool.p]\ndriver = \"null\"\nwhen_full = \"wait\"\n").contains("has no key `when_full`"));
    load_text("t", "[policy.gold]\ndurability = \"local\"\ndedup = \"tenant\"\nwhen_full = \"error\"\n", Vec::new()).unwrap();
    load_text("t", "[pool.p]\ndriver = \"file\"\npath = \"/a\"\nwhen_full = \"wait\"\n", Vec::new()).unwrap();
    for size in ["512K", "1048577", "much"] {
        assert!(problems(&format!("[daemon]\nlog_size = \"{size}\"\n")).starts_with("t.toml:2: daemon.log_size"), "{size}");
    }
    let faults = load_text("t", "[daemon]\nfaults = \"read errno=5\"\n", Vec::new());
    assert_eq!(faults.is_ok(), cfg!(feature = "fault-injection"));
}

#[test]
fn a_bucket_needs_its_keys_and_no_secret_stands_in_the_file() {
    let variables = [("NOVASTOR_POOL__C_1__ACCESS_KEY_ID", "id"), ("NOVASTOR_POOL__C_1__SECRET_KEY", "secret")];
    let with_keys = |rest: &str| with(&format!("[pool.c-1]\ndriver = \"s3\"\n{rest}"), &variables);
    let config = with_keys("bucket = \"b\"\nendpoint = \"https://x\"\n").unwrap();
    assert_eq!(s3_access_key(&config.pool["c-1"]).unwrap(), ("id".to_owned(), "secret".to_owned()));
    let refused = |rest: &str| with_keys(rest).unwrap_err().to_string();
    assert!(refused("").contains("needs the key `bucket`"));
    assert!(refused("bucket = \"b\"\nendpoint = \"http://x\"\n").contains("allow_http"));
    assert!(with_keys("bucket = \"b\"\nendpoint = \"http://x\"\nallow_http = true\n").is_ok());
    assert!(refused("bucket = \"b\"\npath = \"/a\"\n").contains("has no key `path`"));
    let text = refused("bucket = \"b\"\nsecret_key = \"x\"\n");
    assert!(text.contains("t.toml:4: ") && text.contains("NOVASTOR_POOL__C_1__SECRET_KEY"), "{text}");
    assert!(problems("[pool.c]\ndriver = \"s3\"\nbucket = \"b\"\n").contains("access_key_id_file"));
}

#[test]
fn listeners_beyond_loopback_need_tls() {
    assert!(problems("[daemon]\nnbd = [\"tcp:0.0.0.0:10809\"]\n").contains("needs [tls]"));
    assert!(problems("[daemon]\nadmin = \"tcp:192.0.2.1:1\"\n").contains("needs [tls]"));
    assert!(problems("[[export]]\nvolume = \"a\"\nnbd = \"tcp:[::]:1\"\n").contains("needs [tls]"));
    load_text("t", "[daemon]\nnbd = [\"tcp:127.0.0.1:10809\", \"tcp:[::1]:10809\"]\n", Vec::new()).unwrap();
}

#[test]
fn a_level_that_is_none_does_not_silence_the_log() {
    for level in ["warning", "info,verbose", "INFOO"] {
        let refused = problems(&format!("[log]\nlevel = {level:?}\n"));
        assert!(refused.starts_with("t.toml:2: log.level: there is no level"), "{refused}");
    }
    for level in ["warn", "WARN", "off", "info,nbd=debug", "nbd=debug"] {
        load_text("t", &format!("[log]\nlevel = {level:?}\n"), Vec::new()).unwrap();
    }
}

#[test]
fn socket_paths_and_modes_are_checked() {
    let long = format!("[daemon]\nadmin = \"unix:/{}\"\n", "a".repeat(107));
    assert!(problems(&long).contains("108 bytes"));
    let long = format!("[[export]]\nvolume = \"a\"\nvhost_user = \"/{}\"\n", "a".repeat(107));
    assert!(problems(&long).contains("108 bytes"));
    for mode in ["\"rw\"", "\"0888\"", "\"01777\"", "\"+660\""] {
        assert!(problems(&format!("[daemon]\nsocket_mode = {mode}\n")).contains("no mode"), "{mode}");
    }
}

#[test]
fn secrets_stay_out_of_the_file_and_out_of_readable_files() {
    assert!(problems("[daemon]\nadmin_token = \"x\"\n").contains("NOVASTOR_DAEMON__ADMIN_TOKEN"));
    assert!(problems("[tls]\ncert = \"a\"\nkey = \"x\"\n").contains("key_file"));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
    let text = format!("[daemon]\nadmin_token_file = {:?}\n", file.path());
    let config = load_text("t", &text, Vec::new()).unwrap();
    assert_eq!(admin_token(&config).unwrap().as_deref(), Some("0123456789abcdef"));
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(file.path(), open).unwrap();
    assert!(problems(&text).contains("chmod 0600"));
    let keyring = |path: &std::path::Path| format!("[pool.c]\ndriver = \"rbd\"\npool = \"p\"\nkeyring = {path:?}\n");
    let refused = problems(&keyring(file.path()));
    assert!(refused.starts_with("t.toml:4: pool.c.keyring: ") && refused.contains("chmod 0600"), "{refused}");
    load_text("t", &keyring(std::path::Path::new("/nowhere/keyring")), Vec::new()).unwrap();
    let config = with("", &[("NOVASTOR_DAEMON__ADMIN_TOKEN", "0123456789abcdef")]).unwrap();
    assert_eq!(admin_token(&config).unwrap().as_deref(), Some("0123456789abcdef"));
}

#[test]
fn key_encryption_keys_come_from_one_place_each_and_stay_out_of_the_file() {
    assert!(problems("[policy.a]\nencryption = true\n").contains("needs [keys]"));
    assert!(problems("[keys]\n").contains("needs `file`"));
    assert!(problems("[keys]\nkey = \"ab\"\n").contains("NOVASTOR_KEYS__KEY"));
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!("[keys]\nfile = {:?}\n[policy.a]\nencryption = true\n", file.path());
    assert!(problems(&text).contains("64 hexadecimal digits"));
    let [key, previous] = ["ab", "cd"].map(|pair| pair.repeat(32));
    std::fs::write(file.path(), &key).unwrap();
    let config = with(&text, &[("NOVASTOR_KEYS__PREVIOUS_KEY", &previous)]).unwrap();
    let keks = key_encryption_keys(config.keys.as_ref().unwrap()).ok().unwrap();
    assert!(keks.current.is_some() && keks.previous.is_some());
    assert!(with(&text, &[("NOVASTOR_KEYS__KEY", &key)]).unwrap_err().to_string().contains("name one"));
    std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(problems(&text).contains("chmod 0600"));
}

#[test]
fn the_environment_overrides_every_kind_of_key() {
    let text = "[pool.fast-one]\ndriver = \"file\"\npath = \"/a\"\n[[export]]\nvolume = \"a\"\nnbd = true\n";
    let variables = [
        ("NOVASTOR_DAEMON__THREADS", "7"),
        ("NOVASTOR_DAEMON__NBD", "unix:/run/a.sock, tcp:127.0.0.1:1"),
        ("NOVASTOR_POOL__FAST_ONE__PATH", "/b"),
        ("NOVASTOR_POOL__NEW__DRIVER", "null"),
        ("NOVASTOR_LOG__FORMAT", "json"),
        ("NOVASTOR_EXPORT__0__READ_ONLY", "true"),
        ("NOVASTOR_ADMIN", "unix:/ignored"),
        ("HOME", "/root"),
    ];
    let config = with(text, &variables).unwrap();
    assert_eq!(config.daemon.threads, 7);
    assert_eq!(config.daemon.nbd, ["unix:/run/a.sock", "tcp:127.0.0.1:1"]);
    assert_eq!(config.pool["fast-one"].path.as_deref(), Some(std::path::Path::new("/b")));
    assert_eq!(config.pool["new"].driver, "null");
    assert_eq!(config.log.format, LogFormat::Json);
    assert!(config.export[0].read_only);
}

#[test]
fn wrong_overrides_name_the_variable() {
    let text = with("", &[("NOVASTOR_DAEMON__THRAEDS", "7")]).unwrap_err().to_string();
    assert_eq!(text, "environment NOVASTOR_DAEMON__THRAEDS: unknown key `thraeds` in [daemon]: did you mean `threads`?");
    let text = with("", &[("NOVASTOR_DAEMON__THREADS", "many")]).unwrap_err().to_string();
    assert!(text.starts_with("environment NOVASTOR_DAEMON__THREADS: daemon.threads: invalid type"), "{text}");
    let text = with("", &[("NOVASTOR_EXPORT__3__VOLUME", "a")]).unwrap_err().to_string();
    assert!(text.contains("no [[export]] number 3"), "{text}");
}

#[test]
fn two_pools_in_one_folder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (real, link) = (folder.path().join("real"), folder.path().join("link"));
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let text = |second| format!("[pool.a]\ndriver = \"file\"\npath = {real:?}\n[pool.b]\ndriver = \"file\"\npath = {second:?}\n");
    for same in [real.clone(), link, folder.path().join("./real/")] {
        let refused = problems(&text(same));
        assert!(refused.starts_with("t.toml:6: pool.b.path: pool a has"), "{refused}");
    }
    load_text("t", &text(folder.path().join("other")), Vec::new()).unwrap();
}

#[test]
fn two_listeners_on_one_address_are_refused() {
    let daemon = |rest: &str| format!("[daemon]\n{rest}");
    for (first, second) in [
        ("metrics = \"127.0.0.1:9\"", "nbd = [\"tcp:127.0.0.1:9\"]"),
        ("metrics = \"0.0.0.0:9\"", "nbd = [\"tcp:localhost:9\"]"),
        ("threads = 1", "nbd = [\"unix:/run/a\", \"unix:/run/a\"]"),
        ("admin = \"unix:/run/a\"", "nbd = [\"unix:/run/a\"]"),
    ] {
        let refused = problems(&daemon(&format!("{first}\n{second}\n")));
        assert!(refused.starts_with("t.toml:3: daemon.nbd.") && refused.contains(" already"), "{refused}");
    }
    let good = "metrics = \"127.0.0.1:9\"\nnbd = [\"tcp:[::1]:9\", \"tcp:127.0.0.1:0\", \"tcp:127.0.0.1:0\"]\n";
    load_text("t", &daemon(good), Vec::new()).unwrap();
}

#[test]
fn the_files_of_tls_are_looked_for() {
    let tls = TlsFiles::new();
    let text = |cert: &str, ca: &str| format!("[tls]\ncert = {cert:?}\nkey_file = {:?}\nclient_ca = {ca:?}\n", tls.key.path());
    let there = tls.cert.path().to_str().unwrap();
    load_text("t", &text(there, there), Vec::new()).unwrap();
    let other = TlsFiles::new();
    let refused = problems(&text(other.cert.path().to_str().unwrap(), there));
    assert!(refused.starts_with("t.toml:1: tls: ") && refused.contains("certificate and key"), "{refused}");
    std::fs::write(other.cert.path(), "no PEM").unwrap();
    let refused = problems(&text(there, other.cert.path().to_str().unwrap()));
    assert!(refused.starts_with("t.toml:1: tls: ") && refused.contains("client CA"), "{refused}");
    let refused = problems(&text("/nowhere/tls.crt", "/nowhere/ca.crt"));
    assert!(refused.contains("t.toml:2: tls.cert: /nowhere/tls.crt: No such file"), "{refused}");
    assert!(refused.contains("t.toml:4: tls.client_ca: /nowhere/ca.crt: No such file"), "{refused}");
}
