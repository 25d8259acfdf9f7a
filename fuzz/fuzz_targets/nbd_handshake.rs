//! The NBD negotiation: any client words, in any portions, with TLS required or not.
//!
//! Input: one byte of settings, one that sets the size of portions, then what the client says. Checked: every answer is well
//! formed, nothing but refusals is said before TLS where it is required, and portions change nothing.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd::negotiation::{Description, Directory, Encryption, Negotiation, Outcome, Refusal};
use nbd::protocol::{OPTION_REPLY_MAGIC, option, option_reply};

struct Exports;

impl Directory for Exports {
    type Export = ();

    fn list(&self, visit: &mut dyn FnMut(&str, &str)) {
        visit("disk", "a disk");
        visit("other", "");
    }

    fn find(&self, name: &str) -> Result<((), Description), Refusal> {
        match name {
            "" | "disk" => {
                let (name, description) = ("disk".into(), "a disk".into());
                Ok(((), Description { name, description, size: 1 << 40, flags: 0, preferred_size: 4096 }))
            }
            "other" => Err(Refusal::Policy("not for you".into())),
            _ => Err(Refusal::Unknown),
        }
    }
}

/// What was said, and how it ended.
fn converse(encryption: Encryption, words: &[u8], portion: usize) -> (Vec<u8>, String) {
    let mut negotiation = Negotiation::new(encryption);
    let (mut pending, mut output) = (Vec::new(), Vec::new());
    for part in words.chunks(portion) {
        pending.extend_from_slice(part);
        loop {
            let said = output.len();
            let (taken, outcome) = match negotiation.advance(&pending, &mut output, &Exports) {
                Ok(step) => step,
                Err(violation) => {
                    assert_eq!(output.len(), said, "a violation is not answered");
                    return (output, violation.to_string());
                }
            };
            assert!(taken <= pending.len());
            check_replies(&output[said..], encryption == Encryption::Required);
            pending.drain(..taken);
            match outcome {
                Outcome::Continue => assert!(taken > 0),
                Outcome::NeedsInput => break,
                Outcome::StartTls => {
                    assert_eq!(encryption, Encryption::Required);
                    return (output, "TLS".into());
                }
                Outcome::Chosen(chosen) => {
                    assert_eq!(chosen.name, "disk");
                    return (output, format!("{chosen:?}"));
                }
                Outcome::Aborted => return (output, "aborted".into()),
            }
        }
    }
    (output, "open".into())
}

fn check_replies(mut output: &[u8], before_tls: bool) {
    while output.starts_with(&OPTION_REPLY_MAGIC.to_be_bytes()) {
        let word = |at: usize| u32::from_be_bytes(output[at..at + 4].try_into().unwrap());
        let (asked, kind, len) = (word(8), word(12), word(16) as usize);
        if before_tls && asked != option::STARTTLS && asked != option::ABORT {
            assert!(matches!(kind, option_reply::ERR_TLS_REQD | option_reply::ERR_TOO_BIG));
        }
        output = &output[20 + len..];
    }
    assert!(matches!(output.len(), 0 | 10 | 134), "neither a reply nor the old answer to EXPORT_NAME");
}

fuzz_target!(|data: &[u8]| {
    let [settings, portion, words @ ..] = data else { return };
    let encryption = match settings % 3 {
        0 => Encryption::Off,
        1 => Encryption::Required,
        _ => Encryption::Established,
    };
    let whole = converse(encryption, words, words.len().max(1));
    let portions = converse(encryption, words, usize::from(*portion) + 1);
    assert_eq!(whole, portions);
});
