use proptest::prelude::*;

use super::*;
use crate::protocol::{ALLOCATION_CONTEXT, OPTION_REPLY_MAGIC, PAYLOAD_MAX, info};

/// Two exports: one open, one not for this client.
struct Exports;

impl Directory for Exports {
    type Export = &'static str;

    fn list(&self, visit: &mut dyn FnMut(&str, &str)) {
        visit("disk", "a disk");
    }

    fn find(&self, name: &str) -> Result<(&'static str, Description), Refusal> {
        match name {
            "" | "disk" => Ok((
                "the disk",
                Description {
                    name: "disk".into(),
                    description: "a disk".into(),
                    size: 1 << 40,
                    flags: transmission_flag::SEND_FLUSH,
                    preferred_size: 4096,
                },
            )),
            "secret" => Err(Refusal::Policy("not for you".into())),
            _ => Err(Refusal::Unknown),
        }
    }

    fn contexts(&self, _export: &&'static str) -> Vec<String> {
        (0..20).map(|number| format!("own:kind:{number}")).collect()
    }
}

/// What a client saw: replies to options, and how it ended.
#[derive(Debug, Default)]
struct Seen {
    replies: Vec<(u32, u32, Vec<u8>)>,
    rest: Vec<u8>,
}

impl Seen {
    fn parse(mut output: &[u8]) -> Seen {
        let mut seen = Seen::default();
        while output.starts_with(&OPTION_REPLY_MAGIC.to_be_bytes()) {
            let word = |at: usize| u32::from_be_bytes(output[at..at + 4].try_into().unwrap());
            let (option, kind, len) = (word(8), word(12), word(16) as usize);
            seen.replies.push((option, kind, output[20..20 + len].to_vec()));
            output = &output[20 + len..];
        }
        seen.rest = output.to_vec();
        seen
    }

    fn kinds(&self) -> Vec<u32> {
        self.replies.iter().map(|(_, kind, _)| *kind).collect()
    }

    fn infos(&self) -> Vec<u16> {
        let infos = self.replies.iter().filter(|(_, kind, _)| *kind == option_reply::INFO);
        infos.map(|(.., data)| u16::from_be_bytes([data[0], data[1]])).collect()
    }
}

struct Client {
    negotiation: Negotiation,
}

impl Client {
    fn with(encryption: Encryption, flags: u32) -> Client {
        let mut client = Client { negotiation: Negotiation::new(encryption) };
        let (outcome, _) = client.say(&flags.to_be_bytes());
        assert!(matches!(outcome, Ok(Outcome::Continue)));
        client
    }

    fn new() -> Client {
        Client::with(Encryption::Off, client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES)
    }

    /// Sends one message that is handled as a whole.
    fn say(&mut self, message: &[u8]) -> (Result<Outcome<&'static str>, Violation>, Seen) {
        let mut output = Vec::new();
        let mut at = 0;
        let result = loop {
            match self.negotiation.advance(&message[at..], &mut output, &Exports) {
                Ok((taken, Outcome::Continue)) if at + taken < message.len() => at += taken,
                Ok((taken, outcome)) => {
                    assert!(at + taken == message.len() || matches!(outcome, Outcome::NeedsInput), "input left over");
                    break Ok(outcome);
                }
                Err(violation) => break Err(violation),
            }
        };
        (result, Seen::parse(&output))
    }

    fn option(&mut self, option: u32, data: &[u8]) -> (Result<Outcome<&'static str>, Violation>, Seen) {
        self.say(&message(option, data))
    }

    fn kinds(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        self.option(option, data).1.kinds()
    }
}

fn message(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| bytes.extend(kind.to_be_bytes()));
    bytes
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| bytes.extend(string(query)));
    bytes
}

#[test]
fn go_tells_what_was_asked_for_and_enters() {
    let mut client = Client::new();
    let (outcome, seen) = client.option(option::GO, &go("disk", &[info::BLOCK_SIZE, info::NAME, 77, info::DESCRIPTION]));
    let Ok(Outcome::Chosen(chosen)) = outcome else { panic!("{outcome:?}") };
    assert_eq!((chosen.export, chosen.headers, chosen.allocation_context), ("the disk", Headers::Simple, false));
    assert_eq!(seen.infos(), [info::EXPORT, info::BLOCK_SIZE, info::NAME, info::DESCRIPTION]);
    assert_eq!(seen.kinds().last(), Some(&option_reply::ACK));
    let export = &seen.replies[0].2;
    assert_eq!(export[2..10], (1u64 << 40).to_be_bytes());
    let flags = transmission_flag::SEND_FLUSH | transmission_flag::HAS_FLAGS;
    assert_eq!(export[10..], flags.to_be_bytes());
    let sizes = [1, 4096, PAYLOAD_MAX as u32].map(u32::to_be_bytes).concat();
    assert_eq!(seen.replies[1].2[2..], sizes);
}

#[test]
fn info_leaves_the_client_negotiating() {
    let mut client = Client::new();
    assert!(matches!(client.option(option::INFO, &go("", &[])).0, Ok(Outcome::Continue)));
    assert_eq!(client.kinds(option::INFO, &go("nothing", &[])), [option_reply::ERR_UNKNOWN]);
    let (_, seen) = client.option(option::GO, &go("secret", &[]));
    assert_eq!(seen.replies, [(option::GO, option_reply::ERR_POLICY, b"not for you".to_vec())]);
    assert_eq!(client.kinds(option::LIST, &[]), [option_reply::SERVER, option_reply::ACK]);
    assert!(matches!(client.option(option::ABORT, b"bye").0, Ok(Outcome::Aborted)));
}

#[test]
fn malformed_data_is_invalid() {
    let mut long_name = go(&"x".repeat(5000), &[]);
    let mut trailing = go("disk", &[1]);
    trailing.push(0);
    let mut short = go("disk", &[1, 2]);
    short.pop();
    let nul = go("di\0sk", &[]);
    let not_utf8 = [0, 0, 0, 1, 0xff, 0, 0];
    let huge_len = [0xff, 0xff, 0xff, 0xff, 0, 0];
    let mut client = Client::new();
    long_name.truncate(5006);
    for data in [&long_name[..], &trailing, &short, &nul, &not_utf8, &huge_len, &[]] {
        assert_eq!(client.kinds(option::INFO, data), [option_reply::ERR_INVALID]);
        assert_eq!(client.kinds(option::GO, data), [option_reply::ERR_INVALID]);
    }
    for option in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS, option::STARTTLS] {
        assert_eq!(client.kinds(option, b"x"), [option_reply::ERR_INVALID], "option {option}");
    }
    for option in [4, 12, 999, u32::MAX] {
        assert_eq!(client.kinds(option, b"whatever"), [option_reply::ERR_UNSUP]);
    }
}

#[test]
fn the_old_way_to_choose_cannot_be_refused_politely() {
    let (outcome, seen) = Client::new().option(option::EXPORT_NAME, b"disk");
    assert!(matches!(outcome, Ok(Outcome::Chosen(_))));
    assert_eq!(seen.rest.len(), 10);
    let (_, seen) = Client::with(Encryption::Off, client_flag::FIXED_NEWSTYLE).option(option::EXPORT_NAME, b"");
    assert_eq!(seen.rest.len(), 10 + 124);
    for name in [&b"nothing"[..], b"secret", b"\xff"] {
        let (outcome, seen) = Client::new().option(option::EXPORT_NAME, name);
        assert!(matches!(outcome, Err(Violation::ExportName { .. })));
        assert!(seen.replies.is_empty() && seen.rest.is_empty());
    }
    let mut extended = Client::new();
    assert_eq!(extended.kinds(option::EXTENDED_HEADERS, &[]), [option_reply::ACK]);
    assert!(extended.option(option::EXPORT_NAME, b"disk").0.is_err());
}

#[test]
fn structured_and_extended_replies_exclude_and_imply_each_other() {
    let mut client = Client::new();
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [option_reply::ACK]);
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [option_reply::ERR_INVALID]);
    assert_eq!(client.kinds(option::EXTENDED_HEADERS, &[]), [option_reply::ACK]);
    assert_eq!(client.kinds(option::EXTENDED_HEADERS, &[]), [option_reply::ERR_INVALID]);
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [option_reply::ERR_EXT_HEADER_REQD]);
    let (outcome, seen) = client.option(option::GO, &go("disk", &[]));
    assert!(matches!(outcome, Ok(Outcome::Chosen(chosen)) if chosen.headers == Headers::Extended));
    assert_ne!(u16::from_be_bytes([seen.replies[0].2[10], seen.replies[0].2[11]]) & transmission_flag::SEND_DF, 0);
}

#[test]
fn contexts_belong_to_the_export_they_were_set_for() {
    let mut client = Client::new();
    let set = contexts("disk", &[ALLOCATION_CONTEXT]);
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &set), [option_reply::ERR_INVALID], "not without structured replies");
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [option_reply::ACK]);
    let listed = [option_reply::META_CONTEXT, option_reply::ACK];
    assert_eq!(client.kinds(option::LIST_META_CONTEXT, &contexts("disk", &[])).len(), 1 + 20 + 1);
    assert_eq!(client.kinds(option::LIST_META_CONTEXT, &contexts("disk", &["base:", "x:y"])), listed);
    assert_eq!(client.kinds(option::LIST_META_CONTEXT, &contexts("disk", &["x:y"])), [option_reply::ACK]);
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &contexts("disk", &["base:"])), [option_reply::ACK]);
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &contexts("disk", &["nocolon"])), [option_reply::ERR_INVALID]);
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &contexts("gone", &[])), [option_reply::ERR_UNKNOWN]);
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &set), listed);
    let chosen = |client: &mut Client, name| match client.option(option::GO, &go(name, &[])).0 {
        Ok(Outcome::Chosen(chosen)) => chosen.allocation_context,
        other => panic!("{other:?}"),
    };
    assert!(chosen(&mut client, ""), "the default export is the same one");
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &contexts("gone", &[])), [option_reply::ERR_UNKNOWN]);
    assert!(!chosen(&mut client, "disk"), "a failed request selects nothing");
}

#[test]
fn an_exports_own_contexts_are_listed_and_selected_with_lasting_numbers() {
    let mut client = Client::new();
    client.kinds(option::STRUCTURED_REPLY, &[]);
    let names = |seen: &Seen| -> Vec<(u32, String)> {
        let told = seen.replies.iter().filter(|(_, kind, _)| *kind == option_reply::META_CONTEXT);
        let split =
            |data: &[u8]| (u32::from_be_bytes(data[..4].try_into().unwrap()), String::from_utf8(data[4..].to_vec()).unwrap());
        told.map(|(_, _, data)| split(data)).collect()
    };
    for (query, count) in [("own:", 20), ("own:kind:", 20), ("own:kind:1", 1), ("own:ki", 0)] {
        let seen = client.option(option::LIST_META_CONTEXT, &contexts("disk", &[query])).1;
        assert_eq!(names(&seen).len(), count, "{query}");
    }
    let wanted = ["own:kind:3", ALLOCATION_CONTEXT, "own:kind:0", "own:none"];
    let seen = client.option(option::SET_META_CONTEXT, &contexts("disk", &wanted)).1;
    let own = [(2, "own:kind:0".to_owned()), (5, "own:kind:3".to_owned())];
    assert_eq!(names(&seen), [&[(1, ALLOCATION_CONTEXT.to_owned())], &own[..]].concat());
    let Ok(Outcome::Chosen(chosen)) = client.option(option::GO, &go("disk", &[])).0 else { panic!("no export") };
    assert_eq!((chosen.allocation_context, chosen.contexts), (true, own.to_vec()));
    let all: Vec<String> = Exports.contexts(&"the disk");
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    assert_eq!(client.kinds(option::SET_META_CONTEXT, &contexts("disk", &all)), [option_reply::ERR_TOO_BIG]);
    let Ok(Outcome::Chosen(chosen)) = client.option(option::GO, &go("disk", &[])).0 else { panic!("no export") };
    assert!(!chosen.allocation_context && chosen.contexts.is_empty());
}

#[test]
fn forced_tls_answers_nothing_before_it() {
    let mut client = Client::with(Encryption::Required, client_flag::FIXED_NEWSTYLE);
    for option in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 999] {
        assert_eq!(client.kinds(option, &go("disk", &[])), [option_reply::ERR_TLS_REQD], "option {option}");
    }
    let (outcome, seen) = client.option(option::STARTTLS, &[]);
    assert!(matches!(outcome, Ok(Outcome::StartTls)));
    assert_eq!(seen.kinds(), [option_reply::ACK]);
    client.negotiation.tls_established();
    assert_eq!(client.kinds(option::STARTTLS, &[]), [option_reply::ERR_INVALID]);
    assert_eq!(client.kinds(option::LIST, &[]), [option_reply::SERVER, option_reply::ACK]);

    let required = || Client::with(Encryption::Required, client_flag::FIXED_NEWSTYLE);
    assert!(required().option(option::EXPORT_NAME, b"disk").0.is_err());
    assert!(matches!(required().option(option::ABORT, &[]).0, Ok(Outcome::Aborted)));
    assert_eq!(Client::new().kinds(option::STARTTLS, &[]), [option_reply::ERR_POLICY]);
    assert_eq!(Client::with(Encryption::Required, 0).kinds(option::STARTTLS, &[]), [option_reply::ERR_POLICY]);
}

#[test]
fn long_options_are_skipped_or_end_it() {
    let mut client = Client::new();
    let (outcome, seen) = client.option(option::INFO, &vec![0; OPTION_MAX + 1]);
    assert!(matches!(outcome, Ok(Outcome::Continue)));
    assert_eq!(seen.kinds(), [option_reply::ERR_TOO_BIG]);
    assert_eq!(client.kinds(option::LIST, &[]), [option_reply::SERVER, option_reply::ACK]);
    let mut header = message(option::INFO, &[]);
    header.splice(12.., (OPTION_SKIP_MAX + 1).to_be_bytes());
    assert_eq!(client.say(&header).0.unwrap_err(), Violation::OptionTooLong(OPTION_SKIP_MAX + 1));
    let mut client = Client::new();
    for _ in 0..OPTIONS_MAX {
        assert!(client.option(999, &[]).0.is_ok());
    }
    assert_eq!(client.option(999, &[]).0.unwrap_err(), Violation::TooManyOptions);
}

#[test]
fn garbage_ends_it() {
    let mut negotiation = Negotiation::new(Encryption::Off);
    let result = negotiation.advance(&4u32.to_be_bytes(), &mut Vec::new(), &Exports);
    assert_eq!(result.unwrap_err(), Violation::ClientFlags(4));
    assert!(matches!(Client::new().say(&[7; 16]).0, Err(Violation::OptionMagic(_))));
}

/// Feeds a conversation in pieces and returns all output and the last thing that happened.
fn converse(encryption: Encryption, input: &[u8], cuts: &[usize]) -> (Vec<u8>, String) {
    let mut negotiation = Negotiation::new(encryption);
    let (mut output, mut pending) = (Vec::new(), Vec::new());
    let mut from = 0;
    for to in cuts.iter().map(|cut| cut % (input.len() + 1)).chain([input.len()]) {
        if to < from {
            continue;
        }
        pending.extend_from_slice(&input[from..to]);
        from = to;
        loop {
            match negotiation.advance(&pending, &mut output, &Exports) {
                Err(violation) => return (output, violation.to_string()),
                Ok((taken, outcome)) => {
                    pending.drain(..taken);
                    match outcome {
                        Outcome::NeedsInput => break,
                        Outcome::Continue => {}
                        Outcome::StartTls => negotiation.tls_established(),
                        ended => return (output, format!("{ended:?}")),
                    }
                }
            }
        }
    }
    (output, "open".into())
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("disk"), Just(""), Just("secret"), Just("gone")];
    prop_oneof![
        (0u32..14, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(option, data)| message(option, &data)),
        (prop_oneof![Just(option::INFO), Just(option::GO)], name.clone(), proptest::collection::vec(0u16..6, 0..4))
            .prop_map(|(option, name, wanted)| message(option, &go(name, &wanted))),
        (9u32..11, name, prop_oneof![Just(vec![]), Just(vec![ALLOCATION_CONTEXT]), Just(vec!["base:", "q:r"])])
            .prop_map(|(option, name, queries)| message(option, &contexts(name, &queries))),
        Just(message(option::STRUCTURED_REPLY, &[])),
        Just(message(option::STARTTLS, &[])),
        Just(message(option::INFO, &vec![1; OPTION_MAX + 3])),
        proptest::collection::vec(any::<u8>(), 0..20),
    ]
}

proptest! {
    /// However the network cuts the client's words, the server says the same.
    #[test]
    fn cuts_do_not_matter(
        forced: bool,
        flags in 0u32..5,
        options in proptest::collection::vec(any_option(), 0..8),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let encryption = if forced { Encryption::Required } else { Encryption::Off };
        let input = [flags.to_be_bytes().to_vec(), options.concat()].concat();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
        cuts.sort_unstable();
        let whole = converse(encryption, &input, &[]);
        prop_assert_eq!(converse(encryption, &input, &cuts), whole);
    }
}
