// Lets ggml-vulkan compile with older Vulkan headers (1.3.239 in Debian 12). Include it right after vulkan.hpp; it does nothing with newer
// ones. Names, members and values are the Vulkan specification's.
#pragma once

#include <vulkan/vulkan.hpp>

#include <cstdint>
#include <vector>

#ifndef VK_EXT_layer_settings

namespace vk {

enum class LayerSettingTypeEXT : uint32_t { eBool32 = 0 };

// VkLayerSettingEXT
struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

// VkLayerSettingsCreateInfoEXT; `settings` must outlive it
struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}

    StructureType sType = static_cast<StructureType>(1000496000);
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;
};

} // namespace vk

#endif

// The shaders of a newer glslc are no use without these declarations.
#ifndef VK_KHR_cooperative_matrix
#undef GGML_VULKAN_COOPMAT_GLSLC_SUPPORT
#endif
