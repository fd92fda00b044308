-- Lists the ids of the entries that nobody claimed yet.
--
-- KEYS  1 stream
-- ARGV  1 group; 2 at most so many
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then return {} end
local last = '0-0'
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then last = fields['last-delivered-id'] end
end
local ids = {}
for i, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', ARGV[2])) do ids[i] = entry[1] end
return ids
