//! Random requests on several queues, in any order and with injected errors and delays, against a model of the disk.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use blockdev::Errno;
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use proptest::prelude::*;

use crate::Server;
use crate::frontend::*;

/// Few, so that requests meet.
const SECTORS: u64 = 64;

#[derive(Clone, Debug)]
enum Ask {
    Read { sector: u64, count: u64 },
    Write { sector: u64, count: u64, byte: u8 },
    Zero { sector: u64, count: u64 },
    Flush,
}

fn ask() -> impl Strategy<Value = Ask> {
    let place = || (0..SECTORS, 1..9u64).prop_map(|(sector, count)| (sector, count.min(SECTORS - sector)));
    prop_oneof![
        4 => place().prop_map(|(sector, count)| Ask::Read { sector, count }),
        4 => (place(), 1..=255u8).prop_map(|((sector, count), byte)| Ask::Write { sector, count, byte }),
        2 => place().prop_map(|(sector, count)| Ask::Zero { sector, count }),
        1 => Just(Ask::Flush),
    ]
}

impl Ask {
    fn offer(&self, queue: &Queue, memory: &SharedMemory, head: u16) {
        match self {
            Ask::Read { sector, count } => queue.write_request(memory, head, T_IN, *sector, Data::In(*count as usize * 512)),
            Ask::Write { sector, count, byte } => {
                let bytes = vec![*byte; *count as usize * 512];
                queue.write_request(memory, head, T_OUT, *sector, Data::Out(&bytes));
            }
            Ask::Zero { sector, count } => {
                let range = [sector.to_le_bytes(), count.to_le_bytes()].concat();
                queue.write_request(memory, head, T_WRITE_ZEROES, 0, Data::Out(&range));
            }
            Ask::Flush => queue.write_request(memory, head, T_FLUSH, 0, Data::None),
        }
        queue.offer(memory, head);
    }
}

/// For each sector, the bytes it may hold: one if its last change succeeded, more after a failed or a concurrent one.
struct Model(Vec<Vec<u8>>);

impl Model {
    fn may_become(&mut self, ask: &Ask) {
        let (sector, count, byte) = match ask {
            Ask::Write { sector, count, byte } => (*sector, *count, *byte),
            Ask::Zero { sector, count } => (*sector, *count, 0),
            _ => return,
        };
        for sector in sector..sector + count {
            self.0[sector as usize].push(byte);
        }
    }

    fn check(&self, sector: u64, bytes: &[u8]) -> Result<(), TestCaseError> {
        for (sector, bytes) in (sector..).zip(bytes.chunks(512)) {
            prop_assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn sector {sector}");
            prop_assert!(self.0[sector as usize].contains(&bytes[0]), "sector {sector} holds {}", bytes[0]);
        }
        Ok(())
    }

    /// What a batch left behind is read back, so that the next starts from certainty.
    fn settle(&mut self, sector: u64, byte: u8) {
        self.0[sector as usize] = vec![byte];
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_agree_with_a_model(
        batches in proptest::collection::vec(proptest::collection::vec((0..3usize, ask()), 1..40), 1..6),
        errors in prop_oneof![Just(0u32), Just(200_000)],
        seed in any::<u64>(),
    ) {
        let plan = FaultPlan::new(seed);
        let server = Server::of(Arc::new(Faulty::new(Arc::new(MemoryDisk::new(SECTORS * 512, 1)), plan.clone())));
        let rule = |class| FaultRule {
            class, errors_per_million: errors, errno: Errno::EIO, delay: Duration::ZERO, jitter: Duration::from_millis(2),
        };
        let frontend = Frontend::connect(&server.socket());
        let memory = &frontend.memory;
        let mut queues: Vec<Queue> = (0..3).map(|index| Queue::new(index, 64)).collect();
        queues.iter().for_each(|queue| frontend.start(queue, 0));
        let mut model = Model(vec![vec![0]; SECTORS as usize]);
        for batch in batches {
            plan.set([OpClass::Read, OpClass::Write, OpClass::WriteZeroes, OpClass::Flush].map(rule).to_vec());
            let mut waiting: Vec<HashMap<u16, Ask>> = vec![HashMap::new(); 3];
            for (queue, ask) in batch {
                let head = waiting[queue].len() as u16 * 3;
                if head > 14 * 3 {
                    continue;
                }
                model.may_become(&ask);
                ask.offer(&queues[queue], memory, head);
                waiting[queue].insert(head, ask);
                if seed % 2 == 0 {
                    queues[queue].kick();
                }
            }
            queues.iter().for_each(Queue::kick);
            let mut failed = 0;
            for (queue, waiting) in queues.iter_mut().zip(&mut waiting) {
                while !waiting.is_empty() {
                    let (head, len) = queue.wait_used(memory);
                    let ask = waiting.remove(&head).expect("a head that was offered, once");
                    let status = queue.status(memory, head);
                    failed += u64::from(status != 0);
                    if let (Ask::Read { sector, count }, 0) = (&ask, status) {
                        prop_assert_eq!(u64::from(len), count * 512 + 1);
                        model.check(*sector, &queue.read_data(memory, head, *count as usize * 512))?;
                    }
                }
            }
            prop_assert!(errors > 0 || failed == 0, "an error nobody injected");
            plan.set(Vec::new());
            for sector in 0..SECTORS {
                prop_assert_eq!(queues[0].run(memory, T_IN, sector, Data::In(512)), 0);
                let bytes = queues[0].read_data(memory, 0, 512);
                model.check(sector, &bytes)?;
                model.settle(sector, bytes[0]);
            }
        }
        prop_assert!(!wait_readable(queues[1].error.as_fd(), Duration::ZERO));
    }
}
