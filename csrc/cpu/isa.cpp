#include "isa.hpp"

#include <stdexcept>

namespace fastlora {

namespace {

std::vector<std::string> supported() {
    std::vector<std::string> names{"baseline"};
#ifdef FASTLORA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        names.push_back("avx2");
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            names.push_back("avx512");
        }
    }
#endif
    return names;
}

}  // namespace

const std::vector<std::string>& isas() {
    static const std::vector<std::string> names = supported();
    return names;
}

bool has_bfloat16() {
#ifdef FASTLORA_X86
    static const bool has = isas().back() == "avx512" && __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

Isa find_isa(const std::string& name) {
    const auto& names = isas();
    for (std::size_t index = 0; index < names.size(); ++index) {
        if (names[index] == name || (name.empty() && index + 1 == names.size())) {
            return static_cast<Isa>(index);
        }
    }
    throw std::invalid_argument("this processor cannot run '" + name + "'");
}

}  // namespace fastlora
