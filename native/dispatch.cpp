// Which instruction set runs: the fastest one the processor and its operating system support, or the one SEPTET_CPU names.
//
// Decided at the first call and kept. An unknown or unsupported name is an error of every call from then on, never a silent choice.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(SEPTET_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(SEPTET_AVX_VNNI) || defined(SEPTET_AMX)
#include <cpuid.h>
#elif defined(SEPTET_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(SEPTET_ARM64)
#include <sys/auxv.h>
#endif

#include "kernel_table.h"
#include "septet.h"

namespace septet {
namespace {

struct Candidate {
    const char* name;
    const KernelTable* kernels;  // nullptr: not in this build
    const char* (*obstacle)();   // "" when it can run
};

const char* none() { return ""; }

#if defined(SEPTET_X86)
// libgcc asks cpuid, and xgetbv whether the system saves the wide registers.
const char* avx2_obstacle() {
    const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return supported ? "" : "this processor lacks AVX2, FMA or F16C";
}

const char* avx512_obstacle() {
    if (*avx2_obstacle()) return avx2_obstacle();
    const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq");
    return supported ? "" : "this processor lacks AVX-512 F, BW, VL or DQ";
}

const char* avx512vbmi_obstacle() {
    if (*avx512_obstacle()) return avx512_obstacle();
    const bool supported = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    return supported ? "" : "this processor lacks AVX-512 VBMI, VBMI2 or VNNI";
}

#if defined(SEPTET_AVX_VNNI)
// Compilers learned these names late, so cpuid is asked by hand; the registers are those of AVX2.
const char* avxvnni_obstacle() {
    constexpr int extended_features = 7;
    constexpr unsigned gfni = 1u << 8, avx_vnni = 1u << 4;
    if (*avx2_obstacle()) return avx2_obstacle();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has_gfni = __get_cpuid_count(extended_features, 0, &a, &b, &c, &d) && (c & gfni) != 0;
    const bool has_vnni = __get_cpuid_count(extended_features, 1, &a, &b, &c, &d) && (a & avx_vnni) != 0;
    return has_gfni && has_vnni ? "" : "this processor lacks AVX-VNNI or GFNI";
}
#else
const char* without_avxvnni() { return "the compiler of this build does not know AVX-VNNI"; }
#endif

#if defined(SEPTET_AMX)
// Linux saves tile registers only of processes that have asked for them (arch_prctl, since 5.16), by the number of the state.
bool is_given_tiles() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

const char* amx_obstacle() {
    if (*avx512vbmi_obstacle()) return avx512vbmi_obstacle();
    constexpr int extended_features = 7;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(extended_features, 0, &a, &b, &c, &d) || (d & (tile | int8)) != (tile | int8)) return "this processor lacks AMX for int8";
    static const bool given = is_given_tiles();
    return given ? "" : "the system does not give this process AMX";
}
#else
const char* without_amx() { return "this build is not for Linux, or its compiler does not know AMX"; }
#endif
#else
const char* not_x86() { return "this build is not for x86-64"; }
#endif

#if defined(SEPTET_ARM64)
#if defined(__APPLE__)
bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
// The bits of Linux, by value: old headers do not name them.
bool has_dotprod() { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }
#endif
const char* dotprod_obstacle() { return has_dotprod() ? "" : "this processor lacks the dot product instructions"; }
const char* i8mm_obstacle() { return has_dotprod() && has_i8mm() ? "" : "this processor lacks the int8 matrix or dot product instructions"; }
#else
const char* not_arm() { return "this build is not for AArch64"; }
#endif

const Candidate candidates[] = {
    {"scalar", &kScalarKernels, none},
#if defined(SEPTET_X86)
    {"avx2", &kAvx2Kernels, avx2_obstacle},
#if defined(SEPTET_AVX_VNNI)
    {"avxvnni", &kAvxVnniKernels, avxvnni_obstacle},
#else
    {"avxvnni", nullptr, without_avxvnni},
#endif
    {"avx512", &kAvx512Kernels, avx512_obstacle},
    {"avx512vbmi", &kAvx512VbmiKernels, avx512vbmi_obstacle},
#if defined(SEPTET_AMX)
    {"amx", &kAmxKernels, amx_obstacle},
#else
    {"amx", nullptr, without_amx},
#endif
#else
    {"avx2", nullptr, not_x86},
    {"avxvnni", nullptr, not_x86},
    {"avx512", nullptr, not_x86},
    {"avx512vbmi", nullptr, not_x86},
    {"amx", nullptr, not_x86},
#endif
#if defined(SEPTET_ARM64)
    {"neon", &kNeonKernels, none},
    {"neon-dotprod", &kNeonDotprodKernels, dotprod_obstacle},
    {"neon-i8mm", &kNeonI8mmKernels, i8mm_obstacle},
#else
    {"neon", nullptr, not_arm},
    {"neon-dotprod", nullptr, not_arm},
    {"neon-i8mm", nullptr, not_arm},
#endif
};
constexpr int kCandidates = sizeof candidates / sizeof candidates[0];

struct Choice { const KernelTable* kernels; int error; };

Choice choose_by_name(const char* name) {
    for (const Candidate& candidate : candidates)
        if (std::strcmp(candidate.name, name) == 0) {
            if (*candidate.obstacle()) return {nullptr, SEPTET_ERROR_CPU_UNSUPPORTED};
            return {candidate.kernels, SEPTET_OK};
        }
    return {nullptr, SEPTET_ERROR_CPU_UNKNOWN};
}

Choice choose() {
    const char* forced = std::getenv("SEPTET_CPU");
    if (forced != nullptr && *forced != 0) return choose_by_name(forced);
    Choice best{nullptr, SEPTET_ERROR_CPU_UNSUPPORTED};
    for (const Candidate& candidate : candidates)
        if (!*candidate.obstacle()) best = {candidate.kernels, SEPTET_OK};
    return best;
}

std::atomic<const KernelTable*> set_by_caller{nullptr};

}  // namespace

const KernelTable* active_kernels(int* error) {
    *error = SEPTET_OK;
    if (const KernelTable* kernels = set_by_caller.load(std::memory_order_acquire)) return kernels;
    static const Choice choice = choose();
    *error = choice.error;
    return choice.kernels;
}

}  // namespace septet

extern "C" {

const char* septet_instruction_set_name(int index) {
    return index >= 0 && index < septet::kCandidates ? septet::candidates[index].name : nullptr;
}

const char* septet_instruction_set_obstacle(int index) {
    return index >= 0 && index < septet::kCandidates ? septet::candidates[index].obstacle() : nullptr;
}

int septet_instruction_set(const char** name) {
    if (name == nullptr) return SEPTET_ERROR_NULL;
    int error;
    const septet::KernelTable* kernels = septet::active_kernels(&error);
    if (kernels != nullptr) *name = kernels->name;
    return error;
}

int septet_set_instruction_set(const char* name) {
    const septet::Choice choice = name == nullptr ? septet::Choice{nullptr, SEPTET_OK} : septet::choose_by_name(name);
    if (choice.error == SEPTET_OK) septet::set_by_caller.store(choice.kernels, std::memory_order_release);
    return choice.error;
}

const char* septet_error_message(int error) {
    static const char* const messages[] = {
        "no error",
        "a pointer is NULL",
        "a size is out of range or contradicts another",
        "the bits per pair are not 6, 7 or 8 (split: 7)",
        "a rotation block is not a power of two that divides its axis",
        "a group is not a positive multiple of 4, or differs from the activation segment",
        "unknown code or kind of activations",
        "a symbol or an encoder input is out of range",
        "a number of threads is not positive",
        "no instruction set has this name",
        "this machine lacks the instruction set",
        "out of memory",
        "a model lacks a weight or a vector",
        "a token is not in the vocabulary",
        "the text does not fit the context",
    };
    const int count = sizeof messages / sizeof messages[0];
    return error >= 0 && error < count ? messages[error] : "unknown error number";
}

}  // extern "C"
