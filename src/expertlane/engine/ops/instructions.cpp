// Which instruction sets this CPU and its system have; compiled for any CPU.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
    unsigned a, b, c = 0, d;
    const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
    return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// The sets of -march=x86-64-v4 that none of the others implies.
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi");
}

// Asks the system for the tiles' state too, which a process may only use with its permission.
bool has_amx() {
    unsigned a, b, c, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has_tiles = d >> 24 & 1, multiplies_bf16 = d >> 22 & 1;
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of asm/prctl.h and XCR0
    return has_tiles && multiplies_bf16 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

extern "C" {

// Whether a set that `build.py` names may be used here.
int has_instructions(const char* name) {
    const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (is("avx2")) return has_avx2();
    if (is("avx512")) return has_avx512();
    if (is("avx512_bf16")) return has_avx512_bf16();
    if (is("amx")) return has_amx();
#elif defined(__aarch64__)
    if (is("neon")) return 1;
#if defined(__linux__)
    constexpr unsigned long kHasBf16 = 1 << 14;  // HWCAP2_BF16
    if (is("neon_bf16")) return (getauxval(AT_HWCAP2) & kHasBf16) != 0;
#endif
#endif
    return is("baseline");
}
}
