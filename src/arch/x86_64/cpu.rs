//! What this CPU can do, as images have it.

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};

use whimbrel_images::proto::CpuinfoX86Entry;
use whimbrel_images::proto::cpuinfo_x86_entry::Vendor;

/// `capability_ver` of our images: which registers of which CPUID leaves the words are (see `words`). CRIU numbers its
/// own orders from 1; this is none of them.
pub const CAPABILITY_VERSION: u32 = 0x5748;

/// The feature words: CPUID leaves 1, 7.0, 7.1, 0xd.1 and the extended ones.
fn words(highest: u32, highest_extended: u32) -> Vec<u32> {
    let leaf = |number: u32, sub: u32| -> CpuidResult {
        let top = if number >= 0x8000_0000 {
            highest_extended
        } else {
            highest
        };
        let none = CpuidResult {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
        if number <= top {
            __cpuid_count(number, sub)
        } else {
            none
        }
    };
    // The APIC id and OSPKE-like bits of the running state do not belong to what a program may rely on.
    const OSXSAVE: u32 = 1 << 27;
    let (one, seven, seven_one, save) = (leaf(1, 0), leaf(7, 0), leaf(7, 1), leaf(0xd, 1));
    let (extended, cores) = (leaf(0x8000_0001, 0), leaf(0x8000_0008, 0));
    vec![
        one.edx,
        one.ecx & !OSXSAVE,
        seven.ebx,
        seven.ecx,
        seven.edx,
        seven_one.eax,
        save.eax,
        extended.edx,
        extended.ecx,
        cores.ebx,
    ]
}

/// This CPU.
pub fn identify() -> CpuinfoX86Entry {
    let zero = __cpuid(0);
    let highest_extended = __cpuid(0x8000_0000).eax;
    let text = |parts: &[u32]| parts.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let vendor = match &text(&[zero.ebx, zero.edx, zero.ecx])[..] {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" => Vendor::Amd,
        _ => Vendor::Unknown,
    };
    let signature = __cpuid(1).eax;
    let (base_family, base_model) = (signature >> 8 & 0xf, signature >> 4 & 0xf);
    let family = if base_family == 0xf {
        base_family + (signature >> 20 & 0xff)
    } else {
        base_family
    };
    let model = if matches!(base_family, 6 | 0xf) {
        base_model | (signature >> 16 & 0xf) << 4
    } else {
        base_model
    };
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004u32)
        .filter(|&number| number <= highest_extended)
        .flat_map(|number| {
            let leaf = __cpuid(number);
            text(&[leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        })
        .take_while(|&byte| byte != 0)
        .collect();
    let save = if zero.eax >= 0xd {
        Some(__cpuid_count(0xd, 0))
    } else {
        None
    };
    CpuinfoX86Entry {
        vendor_id: vendor as i32,
        cpu_family: family,
        model,
        stepping: signature & 0xf,
        capability_ver: CAPABILITY_VERSION,
        capability: words(zero.eax, highest_extended),
        model_id: Some(String::from_utf8_lossy(&brand).trim().to_owned()),
        xfeatures_mask: save.map(|leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax)),
        xsave_size: save.map(|leaf| leaf.ebx),
        xsave_size_max: save.map(|leaf| leaf.ecx),
    }
}

/// Why a program that ran on `theirs` may not run on `ours`. `exact` wants the same CPU, `instructions` that no feature is
/// missing, `fpu` that its registers can be restored.
pub fn differences(
    theirs: &CpuinfoX86Entry,
    ours: &CpuinfoX86Entry,
    exact: bool,
    instructions: bool,
    fpu: bool,
) -> Vec<String> {
    let mut why = Vec::new();
    if (exact || instructions) && theirs.capability_ver != ours.capability_ver {
        why.push(format!(
            "its list of features has version {}, which is not known here",
            theirs.capability_ver
        ));
        return why;
    }
    let model = |cpu: &CpuinfoX86Entry| (cpu.vendor_id, cpu.cpu_family, cpu.model);
    if exact && (model(theirs) != model(ours) || theirs.capability != ours.capability) {
        let name = |cpu: &CpuinfoX86Entry| cpu.model_id.clone().unwrap_or_default();
        why.push(format!("the CPU was {} and is {}", name(theirs), name(ours)));
    }
    if instructions {
        for (index, (theirs, ours)) in theirs.capability.iter().zip(&ours.capability).enumerate() {
            let missing = theirs & !ours;
            if missing != 0 {
                why.push(format!("features {missing:#x} of word {index} are missing here"));
            }
        }
    }
    if fpu {
        let missing = theirs.xfeatures_mask.unwrap_or(0) & !ours.xfeatures_mask.unwrap_or(0);
        if missing != 0 {
            why.push(format!("register sets {missing:#x} of XSAVE are missing here"));
        }
    }
    why
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_can_stand_in_for_itself_and_not_for_a_richer_one() {
        let ours = identify();
        assert_eq!(differences(&ours, &ours, true, true, true), Vec::<String>::new());
        let mut richer = ours.clone();
        richer.capability[3] = u32::MAX;
        richer.xfeatures_mask = Some(u64::MAX);
        assert_eq!(differences(&richer, &ours, false, true, true).len(), 2);
        assert_eq!(differences(&ours, &richer, false, true, true), Vec::<String>::new());
    }
}
