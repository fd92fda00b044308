-- Lists the ids of the first unclaimed entries, and counts the entries behind them.
--
-- KEYS    1 stream
-- ARGV    1 group; 2 maximum of ids: each is read with its request, so few are listed
-- result  ids; number of entries behind them; id of the last entry, '' if there is none behind; number of commands
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then return {{}, 0, '', 2} end
local last, claimed = '0-0', 0
for _, group in ipairs(groups) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then last, claimed = fields['last-delivered-id'], fields['pending'] end
end
local ids = {}
for i, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', ARGV[2])) do ids[i] = entry[1] end
if #ids < tonumber(ARGV[2]) then return {ids, 0, '', 3} end
local behind = redis.call('XLEN', KEYS[1]) - claimed - #ids
if behind <= 0 then return {ids, 0, '', 4} end
return {ids, behind, redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1], 5}
