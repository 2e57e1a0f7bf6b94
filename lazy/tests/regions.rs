//! The region map against a model that knows each page by itself.

use std::collections::BTreeMap;

use proptest::prelude::*;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE};
use whimbrel_lazy::regions::{Claim, LazyRange, Page, PageStatus, RangeFlags, RegionMap};

const PAGE: u64 = PAGE_SIZE as u64;
const SPACE: u64 = 400;

type Model = BTreeMap<u64, Page>;

#[derive(Clone, Debug)]
enum Step {
    Insert {
        at: u64,
        pages: u64,
        object: u32,
        flags: RangeFlags,
    },
    Set {
        at: u64,
        pages: u64,
        status: u8,
    },
    Claim {
        at: u64,
        pages: u64,
        max: u64,
    },
    Place,
    Release,
    Fork,
    Remap {
        from: u64,
        to: u64,
        pages: u64,
    },
    Remove {
        at: u64,
        pages: u64,
    },
    Unmap {
        at: u64,
        pages: u64,
    },
    Grow,
}

fn status(code: u8) -> PageStatus {
    [
        PageStatus::Missing,
        PageStatus::InFlight,
        PageStatus::Present,
        PageStatus::Zero,
    ][usize::from(code)]
}

fn steps() -> impl Strategy<Value = Step> {
    let at = 0..SPACE;
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(absent_is_zero, shared, wipe_on_fork, dont_fork)| RangeFlags {
            absent_is_zero,
            shared,
            wipe_on_fork: wipe_on_fork && dont_fork,
            dont_fork: dont_fork && !wipe_on_fork,
        },
    );
    prop_oneof![
        4 => (at.clone(), 1..150u64, 1..4u32, flags)
            .prop_map(|(at, pages, object, flags)| Step::Insert { at, pages, object, flags }),
        2 => (at.clone(), 0..100u64, 0..4u8).prop_map(|(at, pages, status)| Step::Set { at, pages, status }),
        4 => (at.clone(), 0..200u64, 1..80u64).prop_map(|(at, pages, max)| Step::Claim { at, pages, max }),
        2 => Just(Step::Place),
        1 => Just(Step::Release),
        1 => Just(Step::Fork),
        3 => (at.clone(), at.clone(), 1..100u64).prop_map(|(from, to, pages)| Step::Remap { from, to, pages }),
        2 => (at.clone(), 0..100u64).prop_map(|(at, pages)| Step::Remove { at, pages }),
        2 => (at, 0..100u64).prop_map(|(at, pages)| Step::Unmap { at, pages }),
        1 => Just(Step::Grow),
    ]
}

fn touched(model: &Model, at: u64, pages: u64) -> Vec<u64> {
    model.range(at..at + pages).map(|(&page, _)| page).collect()
}

fn step(map: &mut RegionMap, model: &mut Model, claims: &mut Vec<Claim>, step: Step) {
    match step {
        Step::Insert {
            at,
            pages,
            object,
            flags,
        } => {
            // Far apart sources, so that objects do not meet by chance; the same object may be mapped twice.
            let source = (at + 1000) * PAGE;
            let object = MemoryObject::Task(object);
            let range = LazyRange {
                start: at * PAGE,
                pages,
                object,
                source,
                flags,
            };
            let free = touched(model, at, pages).is_empty();
            assert_eq!(map.insert(range, PageStatus::Missing).is_ok(), free);
            if free {
                for page in at..at + pages {
                    let source = (page + 1000) * PAGE;
                    model.insert(
                        page,
                        Page {
                            status: PageStatus::Missing,
                            object,
                            source,
                            flags,
                        },
                    );
                }
            }
        }
        Step::Set {
            at,
            pages,
            status: code,
        } => {
            map.set(at * PAGE, (at + pages) * PAGE, status(code));
            for page in touched(model, at, pages) {
                model.get_mut(&page).unwrap().status = status(code);
            }
        }
        Step::Claim { at, pages, max } => {
            let claim = map.claim(at * PAGE, (at + pages) * PAGE, max);
            let first = model
                .range(at..at + pages)
                .find(|(_, page)| page.status == PageStatus::Missing);
            assert_eq!(claim.map(|c| c.address / PAGE), first.map(|(&page, _)| page));
            if let Some(claim) = claim {
                assert!(claim.run.pages >= 1 && claim.run.pages <= max);
                for offset in 0..claim.run.pages {
                    let page = model
                        .get_mut(&(claim.address / PAGE + offset))
                        .expect("claimed pages are in the map");
                    assert_eq!(page.status, PageStatus::Missing);
                    assert_eq!(
                        (page.object, page.source),
                        (claim.object, claim.run.start + offset * PAGE)
                    );
                    page.status = PageStatus::InFlight;
                }
                claims.push(claim);
            }
        }
        Step::Place => {
            for claim in claims.drain(..) {
                for destination in map.destinations_of(&claim) {
                    for page in 0..destination.pages {
                        let known = model.get_mut(&(destination.address / PAGE + page)).expect("in the map");
                        assert!(matches!(known.status, PageStatus::Missing | PageStatus::InFlight));
                        let source = claim.run.start + (destination.offset + page) * PAGE;
                        assert_eq!((known.object, known.source), (claim.object, source));
                        known.status = PageStatus::Present;
                    }
                    let end = destination.address + destination.pages * PAGE;
                    map.set(destination.address, end, PageStatus::Present);
                }
            }
        }
        Step::Release => {
            for claim in claims.drain(..) {
                map.release(&claim);
                for page in model.values_mut().filter(|page| page.status == PageStatus::InFlight) {
                    let within = (claim.run.start..claim.run.end()).contains(&page.source);
                    if page.object == claim.object && within {
                        page.status = PageStatus::Missing;
                    }
                }
            }
        }
        Step::Fork => {
            *map = map.fork();
            model.retain(|_, page| !page.flags.dont_fork);
            for page in model.values_mut() {
                match page.status {
                    _ if page.flags.wipe_on_fork => page.status = PageStatus::Zero,
                    PageStatus::InFlight => page.status = PageStatus::Missing,
                    _ => {}
                }
            }
            claims.clear();
        }
        Step::Remap { from, to, pages } => {
            // The kernel refuses overlapping moves.
            if from < to + pages && to < from + pages {
                return;
            }
            map.remap(from * PAGE, to * PAGE, pages * PAGE);
            map.promote();
            for page in touched(model, from, pages) {
                let known = model[&page];
                if !known.flags.shared {
                    model.get_mut(&page).unwrap().status = PageStatus::Zero;
                }
                model.insert(to + (page - from), known);
            }
        }
        Step::Remove { at, pages } => {
            map.remove(at * PAGE, (at + pages) * PAGE);
            for page in touched(model, at, pages) {
                let known = model.get_mut(&page).unwrap();
                if !known.flags.shared {
                    known.status = PageStatus::Zero;
                }
            }
        }
        Step::Unmap { at, pages } => {
            map.unmap(at * PAGE, (at + pages) * PAGE);
            for page in touched(model, at, pages) {
                model.remove(&page);
            }
        }
        Step::Grow => {
            let Some((&last, &like)) = model.last_key_value() else {
                return;
            };
            let start = last + 1;
            map.grow(start * PAGE, (start + 3) * PAGE, last * PAGE);
            for page in start..start + 3 {
                model.insert(
                    page,
                    Page {
                        status: PageStatus::Zero,
                        source: page * PAGE,
                        ..like
                    },
                );
            }
        }
    }
}

fn check(map: &RegionMap, model: &Model) {
    for page in 0..SPACE * 3 {
        let expected = model.get(&page).copied();
        // Where zero pages would come from is not part of the promise.
        let blind = |page: Page| match page.status {
            PageStatus::Zero => Page { source: 0, ..page },
            _ => page,
        };
        assert_eq!(
            map.page(page * PAGE + 17).map(blind),
            expected.map(blind),
            "page {page}"
        );
    }
    for code in 0..4 {
        let expected = model.values().filter(|page| page.status == status(code)).count() as u64;
        assert_eq!(map.count(status(code)), expected);
    }
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for &page in model.keys() {
        match spans.last_mut() {
            Some(span) if span.1 == page * PAGE => span.1 += PAGE,
            _ => spans.push((page * PAGE, (page + 1) * PAGE)),
        }
    }
    assert_eq!(map.spans(), spans);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn map_agrees_with_the_naive_model_after_any_steps(steps in prop::collection::vec(steps(), 1..40)) {
        let (mut map, mut model, mut claims) = (RegionMap::new(), Model::new(), Vec::new());
        for one in steps {
            step(&mut map, &mut model, &mut claims, one);
            check(&map, &model);
        }
    }
}

#[test]
fn dropped_pages_never_wait_for_the_source_again() {
    let object = MemoryObject::Task(1);
    let mut map = RegionMap::from_ranges([LazyRange::anonymous(object, 0x10000, 16)]).unwrap();
    let claim = map.claim(0x10000, 0x20000, 8).unwrap();
    map.remove(0x12000, 0x14000);
    map.release(&claim);
    assert_eq!(map.page(0x12000).unwrap().status, PageStatus::Zero);
    let addresses: Vec<(u64, u64)> = map
        .destinations_of(&claim)
        .iter()
        .map(|d| (d.address, d.pages))
        .collect();
    assert_eq!(addresses, [(0x10000, 2), (0x14000, 4)]);
}

#[test]
fn bytes_in_flight_follow_a_moved_mapping() {
    let mut map = RegionMap::from_ranges([LazyRange::anonymous(MemoryObject::Task(1), 0x10000, 16)]).unwrap();
    let claim = map.claim(0x10000, 0x20000, 8).unwrap();
    map.remap(0x12000, 0x90000, 0x2000);
    map.unmap(0x12000, 0x14000);
    let mut found: Vec<_> = map
        .destinations_of(&claim)
        .iter()
        .map(|d| (d.address, d.offset, d.pages))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [(0x10000, 0, 2), (0x14000, 4, 4), (0x90000, 2, 2)]);
}

#[test]
fn malformed_ranges_are_refused() {
    let object = MemoryObject::Task(1);
    for (start, pages) in [(0x1001, 1), (0x1000, 0), (0xffff_ffff_ffff_f000, 2), (0x1000, u64::MAX)] {
        assert!(
            RegionMap::from_ranges([LazyRange::anonymous(object, start, pages)]).is_err(),
            "{start:#x} {pages}"
        );
    }
}

#[test]
fn moves_reported_in_the_wrong_order_end_in_the_right_places() {
    let (one, two) = (MemoryObject::Task(1), MemoryObject::Task(2));
    let at = |object, start| LazyRange::anonymous(object, start, 16);
    // First A moved to C and was unmapped, then B moved to A; but the second move is reported first.
    let (a, b, c, len) = (0x10_0000, 0x20_0000, 0x30_0000, 0x1_0000);
    let mut map = RegionMap::from_ranges([at(one, a), at(two, b)]).unwrap();
    map.remap(b, a, len);
    assert!(map.unsettled());
    map.remap(a, c, len);
    assert!(map.unmapped(b, b + len).is_empty());
    map.promote();
    // A's unmapping concerns what was there before B came, which only the kernel can tell.
    assert_eq!(map.unmapped(a, a + len), [(a, a + len)]);
    assert_eq!(map.page(a).unwrap().object, two);
    assert_eq!(map.page(c).unwrap().object, one);
    assert_eq!((map.pages(), map.page(b)), (32, None));
}
