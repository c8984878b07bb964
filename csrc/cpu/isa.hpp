// Instruction sets: kernels are written once, compiled for each, and chosen at run time.
#pragma once

#include <string>
#include <vector>

// Declares the same functions in the namespace of every instruction set; for a kernel file, in its own.
#if defined(FASTLORA_ISA)
#define FASTLORA_EACH_ISA(...) namespace fastlora::FASTLORA_ISA { __VA_ARGS__ }
#elif defined(FASTLORA_X86)
#define FASTLORA_EACH_ISA(...)              \
    namespace fastlora::baseline { __VA_ARGS__ } \
    namespace fastlora::avx2 { __VA_ARGS__ }     \
    namespace fastlora::avx512 { __VA_ARGS__ }
// The function of that name for an Isa.
#define FASTLORA_PICK(isa, name)                                    \
    ((isa) == fastlora::Isa::avx512 ? &fastlora::avx512::name       \
     : (isa) == fastlora::Isa::avx2 ? &fastlora::avx2::name         \
                                    : &fastlora::baseline::name)
#else
#define FASTLORA_EACH_ISA(...) namespace fastlora::baseline { __VA_ARGS__ }
#define FASTLORA_PICK(isa, name) ((void)(isa), &fastlora::baseline::name)
#endif

namespace fastlora {

enum class Isa { baseline, avx2, avx512 };

// What this processor can run, the widest last.
const std::vector<std::string>& isas();

// Whether it has AVX-512's products of bfloat16, a set of their own.
bool has_bfloat16();

// By its name in isas(); the widest for "". Throws std::invalid_argument for any other.
Isa find_isa(const std::string& name);

}  // namespace fastlora
